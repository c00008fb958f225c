"""`ray up`, `serve deploy` and Slurm: their files satisfy Ray's own schemas, and name what exists."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from click.testing import CliRunner
from ray.scripts.scripts import cli as ray_cli
from typer.main import get_command

from cluster import nodes
from cluster.embedded import environment
from service import cli
from service.app import application
from service.settings import Settings
from tests.cluster.test_embedded import head_of
from tests.helm.chart import pods, render

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
RAY_UP = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
SERVE = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
SLURM = CLUSTER / "slurm.sh"


def ray_schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    return found


def test_ray_up_takes_the_cluster() -> None:
    jsonschema.validate(RAY_UP, ray_schema())
    wrong = RAY_UP | {"max_worker": 8}
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(wrong, ray_schema())


def test_ray_itself_fills_in_the_cluster_without_complaint() -> None:
    """Its own checks beyond the schema: node types, the head among them, sums of workers."""
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    validate_config(fillout_defaults(json.loads(json.dumps(RAY_UP))))


def commands(lines: list[str]) -> list[tuple[dict[str, str], list[str]]]:
    """Variables and words of each command."""
    found = []
    for line in lines:
        words = shlex.split(line)
        variables = [word for word in words if re.match(r"[A-Z_a-z]+=", word) and not word.startswith("-")]
        found.append(
            (dict(word.split("=", 1) for word in variables), [word for word in words if word not in variables])
        )
    return found


def test_what_starts_ray_has_options_that_exist_and_a_token() -> None:
    starts = [*commands(RAY_UP["head_start_ray_commands"]), *commands(RAY_UP["worker_start_ray_commands"])]
    known = {option for parameter in ray_cli.commands["start"].params for option in parameter.opts}
    for variables, words in starts:
        assert Path(words[0]).name in ("ray", "serve")
        if words[1] == "start":
            assert variables["RAY_AUTH_MODE"] == "token"
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known
        ours = {name.removeprefix("MANTA_").lower() for name in variables if name.startswith("MANTA_")}
        assert ours <= set(Settings.model_fields)
    files = {Path(word).expanduser() for _, words in starts for word in words if "/cluster/" in word}
    assert files and all((CLUSTER / file.name).is_file() for file in files)


def test_serve_is_set_up_as_in_the_embedded_cluster(tmp_path: Path) -> None:
    """Limits of messages and paths of requests; workers have them too, since models may run there."""
    embedded_ = {n: v for n, v in environment(head_of(tmp_path)).items() if n.startswith("RAY_SERVE_")}
    assert len(embedded_) > 2
    starts = [*commands(RAY_UP["head_start_ray_commands"]), *commands(RAY_UP["worker_start_ray_commands"])]
    assert all(embedded_.items() <= variables.items() for variables, words in starts if words[1] == "start")
    node = nodes.environment(head_of(tmp_path, ip="10.0.0.5"), tmp_path, {}, drain_s=1)
    assert embedded_.items() <= node.items()
    for pod in pods(render("minimal")):
        if pod.role in ("head", "worker"):
            given = {e["name"]: e.get("value") for e in pod.spec["containers"][0]["env"]}
            assert embedded_.items() <= given.items()


def test_the_cluster_that_may_come_is_the_one_that_is_told_of() -> None:
    """The setting of the service names the nodes of the autoscaler."""
    variables = commands(RAY_UP["head_start_ray_commands"])[1][0]
    nodes = RAY_UP["available_node_types"]["gpu"]
    told = json.loads(variables["MANTA_CLUSTER_NODES"])
    assert told == [{"count": nodes["max_workers"], "resources": nodes["resources"]}]
    assert nodes["max_workers"] <= RAY_UP["max_workers"]


def test_nothing_of_ray_is_reached_from_elsewhere() -> None:
    head = " ".join(RAY_UP["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head and "--num-cpus=0" in head
    assert not re.search(r"(token|password)=[0-9a-f]{16}", (CLUSTER / "ray-cluster.yaml").read_text())


def test_serve_takes_the_front_end() -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(SERVE)
    (app,) = config.applications
    assert app.import_path == f"{application.__module__}:{application.__name__}"
    built = call_user_app_builder_with_args_if_necessary(application, app.args)
    deployment = built._bound_deployment
    assert deployment.name == "api"
    assert deployment.ray_actor_options["resources"] == {"node:__internal_head__": 0.001}


def test_the_front_end_beyond_loopback_asks_for_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVE["applications"][0]["runtime_env"]["env_vars"].items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.host, settings.tokens) == (SERVE["http_options"]["host"], "required")


STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
name=$(sed -n 's/.*--\\(job-\\)\\?name=\\([a-z]*\\).*/\\2/p' <<< "$*")
case "$(basename "$0") $*" in
    scontrol*) printf '%s\\n' ${@: -1} ;;
    *hostname*) echo "10.0.0.7 fe80::1" ;;
    squeue*) cat "$CALLS.step-$name" ;;
    scancel*--signal=TERM*) kill -TERM "${2##*.}" ;;
    srun*)
        trap_="trap 'echo drained $name >> $CALLS; exit 1' TERM"
        bash -c "$trap_; echo 77.\\$\\$ > $CALLS.step-$name; while :; do sleep 0.05; done" &
        trap 'kill -KILL $!; echo "killed $name" >> "$CALLS"' TERM
        wait $! || wait ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment with stand-ins for Slurm's commands.

    A step is a task that ends by SIGTERM in its own time. As the real one, srun kills its task when it gets that signal
    itself, while scancel hands it to the task.
    """
    for name in ("scontrol", "srun", "squeue", "scancel"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node1 node2 node3",  # Slurm writes node[1-3]
        "MANTA_HOME": "/shared/manta",
        "MANTA_VENV": "/shared/venv",
        "MANTA_DATABASE_URL": "postgresql+psycopg://db/manta",
    }


def called(slurm: dict[str, str]) -> list[str]:
    path = Path(slurm["CALLS"])
    return path.read_text().splitlines() if path.exists() else []


def ended_early(slurm: dict[str, str], *steps: str) -> list[str]:
    """What became of the steps, in this order, when the script was told to end once all were there."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    script = subprocess.Popen(["bash", SLURM], env=slurm, start_new_session=True, **pipes)
    started = [Path(f"{slurm['CALLS']}.step-{name}") for name in steps]
    deadline = time.monotonic() + 20
    while not all(step.exists() and step.read_text() for step in started) and time.monotonic() < deadline:
        time.sleep(0.02)
    script.send_signal(signal.SIGTERM)
    try:
        out, err = script.communicate(timeout=20)
    finally:
        with contextlib.suppress(ProcessLookupError):  # as when all has ended
            os.killpg(script.pid, signal.SIGKILL)
    assert script.returncode == 0, out + err
    return [call for call in called(slurm) if call.startswith(("drained", "killed"))]


def test_slurm_drains_the_only_node(slurm: dict[str, str]) -> None:
    assert ended_early(slurm | {"SLURM_JOB_NODELIST": "node1"}, "head") == ["drained head"]


def test_slurm_starts_a_head_and_joins_the_others_and_drains_them_first(slurm: dict[str, str]) -> None:
    assert ended_early(slurm, "head", "workers") == ["drained workers", "drained head"]
    calls = called(slurm)
    serve, join = sorted((shlex.split(call) for call in calls if "manta" in call), key=lambda words: "cluster" in words)
    assert "--nodelist=node1" in serve and " ".join(serve).endswith("manta serve --nodes-at 10.0.0.7")
    assert "--exclude=node1" in join and "--nodes=2" in join
    assert {"--kill-on-bad-exit=0", "--wait=0"} <= set(join)  # else the first that has drained ends the others
    for words in (serve, join):
        expect_command(words[words.index("manta") + 1 :])


def expect_command(words: list[str]) -> None:
    """The command and each option of it exist."""
    cli._more_commands()
    options = [word for word in words if word.startswith("--")]
    path = words[: words.index(options[0])]
    shown = CliRunner().invoke(get_command(cli.app), [*path, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and all(option in shown.output for option in options), shown.output


@pytest.mark.parametrize("missing", ["MANTA_HOME", "MANTA_VENV", "MANTA_DATABASE_URL"])
def test_slurm_says_what_it_needs(slurm: dict[str, str], missing: str) -> None:
    del slurm[missing]
    done = subprocess.run(["bash", SLURM], env=slurm, capture_output=True, text=True, timeout=20)
    assert done.returncode != 0 and f"{missing}: set it to" in done.stderr
    assert called(slurm) == []


def test_time_to_drain_fits_into_what_slurm_leaves() -> None:
    text = SLURM.read_text()
    leaves = int(re.search(r"--signal=B:TERM@(\d+)", text)[1])  # type: ignore[index]
    drain = int(re.search(r"--drain (\d+)", text)[1])  # type: ignore[index]
    assert drain + 30 <= leaves


def test_files_are_named_in_the_readme() -> None:
    readme = (CLUSTER / "README.md").read_text()
    for path in sorted(CLUSTER.iterdir()):
        if path.suffix in (".yaml", ".sh") or path.name == "Dockerfile":
            assert path.name in readme, f"{path.name} is not in cluster/README.md"
