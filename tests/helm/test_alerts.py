"""Alerts fire on what they are for, and on nothing else, as Prometheus itself evaluates them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.chart import CHART

RULES = CHART / "dashboards" / "rules.yaml"
ALERTS = [rule["alert"] for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]]
HTTP = "manta_http_request_duration_seconds"
RUN = '{job_id="job-1", project="p"}'
RAY = '{instance="n"}'
# Alert -> series that it is for, series that are near and well; three hours, a sample a minute.
SERIES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "MantaDown": ({}, {"manta_build_info": "1x180"}),
    "MantaRayDown": ({"manta_ray_up": "0x180"}, {"manta_ray_up": "1 0 0 1x177"}),
    "MantaReconcilerStuck": (
        {"manta_reconciler_last_round_timestamp_seconds": "60x180"},
        {"manta_reconciler_last_round_timestamp_seconds": "0+60x180"},
    ),
    "MantaQueueStuck": (
        {'manta_queue_oldest_timestamp_seconds{project="p"}': "60x180", 'manta_jobs{state="RUNNING"}': "0x180"},
        {'manta_queue_oldest_timestamp_seconds{project="p"}': "60x180", 'manta_jobs{state="RUNNING"}': "1x180"},
    ),
    "MantaJobsFail": (
        {'manta_jobs_ended_total{state="FAILED"}': "0+0.2x180"},
        {'manta_jobs_ended_total{state="SUCCEEDED"}': "0+0.2x180"},
    ),
    "MantaJobsRestart": (
        {"manta_job_attempts_total": "0+1x180", "manta_jobs_submitted_total": "5x180"},
        {"manta_job_attempts_total": "0+1x180", "manta_jobs_submitted_total": "0+1x180"},
    ),
    "MantaJobSilent": (
        {f"manta_run_updated_timestamp_seconds{RUN}": "60x180"},
        {f"manta_run_updated_timestamp_seconds{RUN}": "0+60x180"},
    ),
    "MantaJobStandsStill": (
        {f"manta_run_step{RUN}": "7x180", f"manta_run_total_steps{RUN}": "100x180"},
        {f"manta_run_step{RUN}": "100x180", f"manta_run_total_steps{RUN}": "100x180"},
    ),
    "MantaLoaderBound": (
        {f"manta_run_data_wait_ratio{RUN}": "0.6x180"},
        {f"manta_run_data_wait_ratio{RUN}": "0.4x180"},
    ),
    "MantaSamplesSkipped": (
        {f"manta_run_skipped_samples_total{RUN}": "0+30x180"},
        {f"manta_run_skipped_samples_total{RUN}": "9000x180"},
    ),
    "MantaCheckpointOld": (
        {f"manta_run_checkpoint_timestamp_seconds{RUN}": "60x180"},
        {f"manta_run_checkpoint_timestamp_seconds{RUN}": "0+60x180"},
    ),
    "MantaMirrorBehind": (
        {f"manta_run_mirror_backlog_checkpoints{RUN}": "2x180"},
        {f"manta_run_mirror_backlog_checkpoints{RUN}": "0 1 0 1 1x176"},
    ),
    "MantaErrors": (
        {f'{HTTP}_count{{status="200"}}': "0+9x180", f'{HTTP}_count{{status="503"}}': "0+1x180"},
        {f'{HTTP}_count{{status="200"}}': "0+9x180", f'{HTTP}_count{{status="404"}}': "0+9x180"},
    ),
    "MantaSlow": (
        {
            f'{HTTP}_bucket{{route="/v1/jobs",le="1"}}': "0+9x180",
            f'{HTTP}_bucket{{route="/v1/jobs",le="2.5"}}': "0+10x180",
            f'{HTTP}_bucket{{route="/v1/jobs",le="+Inf"}}': "0+10x180",
        },
        {
            f'{HTTP}_bucket{{route="/v1/models",le="1"}}': "0+9x180",
            f'{HTTP}_bucket{{route="/v1/models",le="2.5"}}': "0+10x180",
            f'{HTTP}_bucket{{route="/v1/models",le="+Inf"}}': "0+10x180",
        },
    ),
    "MantaDiskFull": (
        {f"ray_node_disk_free{RAY}": "5x180", f"ray_node_disk_usage{RAY}": "95x180"},
        {f"ray_node_disk_free{RAY}": "15x180", f"ray_node_disk_usage{RAY}": "85x180"},
    ),
    "MantaMemoryFull": (
        {f"ray_node_mem_used{RAY}": "96x180", f"ray_node_mem_total{RAY}": "100x180"},
        {f"ray_node_mem_used{RAY}": "90x180", f"ray_node_mem_total{RAY}": "100x180"},
    ),
    "MantaIdleGPUs": (
        {"ray_node_gpus_utilization": "1x180"},
        {"ray_node_gpus_utilization": "60x180"},
    ),
}


def test_each_alert_is_tried() -> None:
    assert list(SERIES) == ALERTS


def fires(alert: str, series: dict[str, str], often: int) -> dict[str, Any]:
    """A test of promtool: how often the alert fires near the end of three hours."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                "eval_time": "170m",
                "exp_samples": [{"labels": "{}", "value": often}],
            }
        ],
    }


def test_alerts_fire_on_what_they_are_for(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; it comes with Prometheus (apt install prometheus)")
    tests = []
    for alert, (bad, well) in SERIES.items():
        tests += [fires(alert, bad, 1), fires(alert, well, 0)]
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    done = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
