"""Values that cannot work are refused, each with a sentence that says what to do."""

from __future__ import annotations

import json

import pytest

from tests.helm.chart import arguments, helm, one, render

GROUP = '{"name":"a","minReplicas":0,"maxReplicas":2,"cpus":1,"memory":"1Gi","nodeSelector":{"a":"b"}}'


def data(*paths: str, same: bool = False) -> str:
    claims = [{"name": "a" if same else f"a{i}", "claim": "c", "mountPath": path} for i, path in enumerate(paths)]
    return f"storage.data={json.dumps(claims)}"


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (('image.repository=""',), "build and push"),
        (('database.mode="external"',), "database.external.existingSecret"),
        (('database.external.existingSecret="x"',), "set database.mode to external"),
        (('gcs.faultTolerance="external"',), "gcs.external.address"),
        (('gcs.external.existingSecret="x"',), "gcs.faultTolerance is none: set gcs.faultTolerance to external"),
        (('gcs={"faultTolerance":"bundled","external":{"existingSecret":"x"}}',), "gcs.faultTolerance is bundled"),
        (('tracing.headersSecret="x"',), "tracing.endpoint is empty"),
        (('jobs.submitters=[{"kind":"ServiceAccount","name":"ci"}]',), "ServiceAccount ci without namespace"),
        ((data("/data/a", "/data/b", same=True),), "two entries named a"),
        ((data("/data", "/data"),), "/data is taken"),
        ((data("/data/a", "/data/a/b"),), "/data/a is taken"),
        ((data("/tmp"),), "/tmp is taken"),
        ((data("/tmp/shards/"),), "/tmp is taken"),
        ((data("/var/lib/manta"),), "/var/lib/manta is taken"),
        ((data("/var/lib/manta/runs"),), "/var/lib/manta is taken"),
        ((data("/var/lib"),), "/var/lib/manta is taken"),
        ((data("/etc/manta"),), "/etc/manta is taken"),
        (('fullnameOverride="1lab"',), "fullnameOverride"),
        (('fullnameOverride="a.b"',), "fullnameOverride"),
        (('nameOverride="a.b"',), "nameOverride"),
        (("networkPolicy.egress=[{}]",), "networkPolicy.egress"),
        (('gcs.faultTolerance="external"', 'gcs.external.address="h:1"'), "set both"),
        (('workers=[{"name":"a","minReplicas":3,"maxReplicas":2,"cpus":1,"memory":"1Gi"}]',), "swap them"),
        (("autoscaling.enabled=false",), "would never have a pod"),
        (('ingress={"enabled":true,"tlsSecret":"x"}',), "ingress.host"),
        (('ingress={"enabled":true,"host":"m.example.org"}',), "in the clear"),
        (('ingress={"enabled":true,"host":"m.example.org","tlsSecret":"x"}',), "networkPolicy.frontendFrom is empty"),
        (("gateway.enabled=true",), "gateway.parent.name"),
        (("monitoring.serviceMonitor=true",), "networkPolicy.metricsFrom"),
        (("serviceAccount.create=false",), "serviceAccount.headName"),
        (('kueue.priorityClass="high"',), "kueue.queue"),
        (
            (
                'storage.home.accessMode="ReadWriteOnce"',
                f"workers=[{GROUP}]",
            ),
            "use ReadWriteMany",
        ),
        (
            (f"workers=[{GROUP},{GROUP}]",),
            "two groups named a",
        ),
        (('workers=[{"name":"a","minReplicas":0,"maxReplicas":2,"cpus":1,"memory":"1Gi","custom":{"GPU":1}}]',), "GPU"),
        (('image.tag="latest"',), "image.tag"),
        (("unknown=1",), "unknown"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(sets: tuple[str, ...], says: str) -> None:
    assert says in helm("template", *arguments("minimal", sets), code=1)


@pytest.mark.parametrize("release", ["1lab", "a.b"])
def test_releases_whose_services_the_api_server_refuses_are_refused(release: str) -> None:
    assert "choose another release name" in helm("template", *arguments("minimal", release=release), code=1)
    docs = render("minimal", 'fullnameOverride="lab"', release=release)
    assert one(docs, "RayService")["metadata"]["name"] == "lab"


def test_paths_beside_what_is_taken_are_free() -> None:
    """Only whole parts of a path count."""
    assert render("minimal", data("/data/a", "/data/ab", "/tmpfs", "/var/lib/manta-data"))
