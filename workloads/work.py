"""What a job does between its start and its end: train, export and evaluate; or search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workloads.evaluate import evaluate
from workloads.export import export
from workloads.journal import Journal
from workloads.metrics import OnPoint
from workloads.online import OnlineEvaluations
from workloads.place import Here, Place, device
from workloads.record import RunFolder
from workloads.spec_any import AnySpec
from workloads.spec_search import SearchSpec


@dataclass(frozen=True)
class Work:
    """A job in its folder.

    Attributes:
        spec: the job.
        run: its folder.
        home: where references to weights are looked up.
        job_id: written into the artifact.
        ray: whether a cluster is at hand.
        should_stop: polled.
        connected: called after `ray.init`, which replaces signal handlers.
    """

    spec: AnySpec
    run: RunFolder
    home: Path
    job_id: str
    ray: bool
    should_stop: Callable[[], bool]
    connected: Callable[[], None]

    def go(self, journal: Journal, on_point: OnPoint) -> bool:
        """The long part, or on with it; False when it was stopped."""
        spec, run = self.spec, self.run
        if isinstance(spec, SearchSpec):
            with journal.training():
                return self._search(spec, on_point)
        place = self._place()
        with OnlineEvaluations(spec, run, self.home, self.job_id, place.online), journal.training():
            return place.train(spec, run, on_point)

    def conclude(self) -> bool:
        """Artifact and evaluations, what of them is not there yet; False when it was stopped in between."""
        spec, run, place = self.spec, self.run, self._place()
        if isinstance(spec, SearchSpec):
            if not run.artifact.exists():
                from workloads.conclude import conclude  # knows networks of timm, which cost each start seconds

                return conclude(spec, run, self.home, self.job_id, place.scan)
            return True
        if not run.artifact.exists():
            export(spec, run, self.home, self.job_id)
        return evaluate(spec, run, self.home, self.job_id, self.should_stop, place)

    def _search(self, spec: SearchSpec, on_point: OnPoint) -> bool:
        if self.ray:
            from workloads.ray_explore import explore_on_ray

            return explore_on_ray(spec, self.run, self.home, connected=self.connected)
        from workloads.explore import explore

        of_one = device(spec.resources)
        return explore(spec, self.run, self.home, of_one, should_stop=self.should_stop, on_point=on_point)

    def _place(self) -> Place:
        """The process itself, or workers of Ray."""
        resources, home, stop = self.spec.resources, self.home, self.should_stop
        if not self.ray:
            return Here(resources, home, stop)
        from workloads.ray_notice import notice
        from workloads.ray_place import Workers, needs_a_group

        if needs_a_group(self.spec):
            return Workers(self.spec, self.run, home, stop, connected=self.connected)
        return Here(resources, home, stop, notice)
