"""The front end as a Serve config starts it, on a cluster that is there: what KubeRay and `serve deploy` do."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest
import yaml

from cluster.embedded import Head

pytestmark = pytest.mark.ray
CONFIG = Path(__file__).parents[2] / "cluster" / "serve.yaml"
TOKEN = "a-token-of-a-secret-store-0123456789"


def test_the_front_end_of_the_config_takes_requests(cluster: Head, tmp_path: Path) -> None:
    """Told of Ray, the database and the first token by variables alone; it asks for tokens and reaches Ray."""
    config = yaml.safe_load(CONFIG.read_text())
    (app,) = config["applications"]
    (tmp_path / "admin_token").write_text(TOKEN)
    app["runtime_env"]["env_vars"] |= {
        "MANTA_HOME": str(tmp_path),
        "MANTA_RAY_DASHBOARD_URL": cluster.dashboard_url,
        "MANTA_FIRST_ADMIN_TOKEN_FILE": str(tmp_path / "admin_token"),
        "MANTA_ALLOWED_ROOTS": "/data s3://bucket",
        "MANTA_CLUSTER_NODES": '[{"count": 1, "resources": {"CPU": 8, "GPU": 8}}]',
    }
    config["http_options"] = {"host": "127.0.0.1", "port": cluster.http_port}
    applications = f"{cluster.dashboard_url}/api/serve/applications/"
    ray = httpx.Client(
        headers={"Authorization": f"Bearer {cluster.token_path.read_text()}"}, timeout=30, trust_env=False
    )
    ray.put(applications, json=config).raise_for_status()
    try:
        answer = _ready(f"{cluster.url}/readyz", ray, applications)
        assert answer.json()["status"] == "ready"
        assert httpx.get(f"{cluster.url}/v1/jobs", trust_env=False).status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{cluster.url}/v1/jobs", headers=headers, trust_env=False).json()["jobs"] == []
    finally:
        ray.delete(applications).raise_for_status()
        ray.close()


def _ready(url: str, ray: httpx.Client, applications: str, timeout_s: float = 120) -> httpx.Response:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            answer = httpx.get(url, timeout=5, trust_env=False)
            if answer.status_code == 200:
                return answer
            said = answer.text
        except httpx.TransportError as error:
            said = str(error)
        assert time.monotonic() < deadline, said + ray.get(applications).text
        time.sleep(0.2)
