"""The chart's own files, without helm: schema, documentation, and that what it names exists in the product."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.scripts.scripts import start as ray_start

from service.parts import build_parts
from service.settings import Settings
from tests.helm.chart import CASES, CHART, values

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
TEMPLATES = "\n".join(path.read_text() for path in sorted((CHART / "templates").rglob("*")) if path.is_file())
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


def test_the_schema_is_one() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)


def test_every_case_of_the_issue_is_there() -> None:
    expected = {"minimal", "gpu-spot", "high-availability", "air-gapped", "external-services", "kueue"}
    assert set(CASES) == expected


@pytest.mark.parametrize("case", CASES)
def test_each_case_satisfies_the_schema(case: str) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(values(case))] == []


def test_schema_and_defaults_have_the_same_keys() -> None:
    def compare(schema: Any, defaults: Any, path: str) -> list[str]:
        if "properties" not in schema:
            return []
        assert schema["additionalProperties"] is False, f"{path} takes unknown keys"
        known, given = set(schema["properties"]) - {"global"}, set(defaults)
        wrong = [f"{path}.{key}" for key in known ^ given]
        return wrong + [w for k in known & given for w in compare(schema["properties"][k], defaults[k], f"{path}.{k}")]

    free = {
        ".frontend.settings." + name
        for name in SCHEMA["properties"]["frontend"]["properties"]["settings"]["properties"]
    }
    assert set(compare(SCHEMA, DEFAULTS, "")) == free


def test_values_of_a_chart_above_are_taken() -> None:
    """Helm gives `global` to every chart that another one depends on."""
    assert [error.message for error in VALIDATOR.iter_errors(DEFAULTS | {"global": {"imageRegistry": "x"}})] == []
    assert "`global`" in (CHART / "values.yaml").read_text() and ".global" not in TEMPLATES


def test_every_value_is_documented() -> None:
    """A comment stands right above each key, or above the section that it is in."""
    lines = (CHART / "values.yaml").read_text().splitlines()
    documented: dict[int, bool] = {}  # indentation of an open section -> whether it has a comment
    silent = []
    for number, line in enumerate(lines):
        match = re.match(r"( *)([A-Za-z]\w*):", line)
        if match is None:
            continue
        indent = len(match[1])
        documented = {depth: told for depth, told in documented.items() if depth < indent}
        told = lines[number - 1].strip().startswith("#")
        section = line.rstrip().endswith(":")
        if not told and not section and not any(documented.values()):
            silent.append(match[2])
        documented[indent] = told and section
    assert silent == []


def test_keys_of_groups_are_documented() -> None:
    text = (CHART / "values.yaml").read_text()
    keys = SCHEMA["properties"]["workers"]["items"]["properties"]
    assert [key for key in keys if not re.search(rf"^#? *-? *[\w, ]*\b{key}\b", text, re.MULTILINE)] == []


def test_the_settings_that_users_may_set_are_those_of_the_service() -> None:
    may = set(SCHEMA["properties"]["frontend"]["properties"]["settings"]["properties"])
    by_chart = {name.lower() for name in re.findall(r"MANTA_([A-Z_]+)(?:,|:|$)", TEMPLATES, re.MULTILINE)}
    assert may | by_chart | {"ray_dashboard_url"} == set(Settings.model_fields)
    assert not may & by_chart


def test_the_options_of_ray_start_exist() -> None:
    options = {option.lstrip("-") for parameter in ray_start.params for option in parameter.opts}
    used = set(re.findall(r"^  ([a-z-]+): (?:\"|0\.0\.0\.0)", TEMPLATES, re.MULTILINE))
    assert {"num-cpus", "dashboard-host", "node-manager-port"} <= used
    assert used <= options


def test_the_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    pins = (CHART.parents[1] / "constraints.txt").read_text().splitlines()
    assert f"ray=={DEFAULTS['rayVersion']}" in pins
    project = (CHART.parents[1] / "pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in project


def test_rules_and_dashboard_ask_for_metrics_that_ray_has() -> None:
    """Names are looked up in the dashboards that come with the installed Ray, and in its sources."""
    import ray

    root = Path(ray.__file__).parent
    sources = [
        *(root / "dashboard/modules/metrics/dashboards").glob("*.py"),
        root / "dashboard/modules/reporter/reporter_agent.py",
    ]
    known = "\n".join(path.read_text() for path in sources)
    files = [(CHART / "dashboards" / name).read_text() for name in ("rules.yaml", "manta.json")]
    metrics = set(re.findall(r"\bray_(?!io_)[a-z_]+", "\n".join(files)))
    assert len(metrics) > 10
    assert {name for name in metrics if name not in known and name.removeprefix("ray_") not in known} == set()


def exported() -> set[str]:
    """Names of samples of a front end, whatever stands in its database; histograms by their three."""
    with tempfile.TemporaryDirectory() as home:
        parts = build_parts(Settings(home=Path(home)))
        found = [(m.name, m.type) for m in parts.exposition.registry.collect()]
        parts.store.close()
    behind = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "info": ("_info",)}
    return {name + suffix for name, kind in found for suffix in behind.get(kind, ("",))}


@pytest.mark.parametrize("file", ["rules.yaml", "manta.json"])
def test_rules_and_dashboard_ask_for_metrics_that_the_service_exports(file: str) -> None:
    asked = set(re.findall(r"\bmanta_[a-z_]+", (CHART / "dashboards" / file).read_text()))
    assert len(asked) > 10 and asked - exported() == set()


def test_the_dashboard_shows_every_family_of_jobs_and_runs() -> None:
    """But for names, what a unit is counted in, and what another panel says already."""
    shown = set(re.findall(r"\bmanta_[a-z_]+", (CHART / "dashboards" / "manta.json").read_text()))
    families = {name for name in exported() if name.startswith(("manta_job", "manta_queue", "manta_run"))}
    elsewhere = {
        "manta_run_checkpoint_step",
        "manta_run_step_seconds",
        "manta_run_training_seconds_total",
        "manta_run_warnings",
    }
    assert families - shown == elsewhere


def test_files_of_the_dashboard_and_the_rules_work_without_the_chart() -> None:
    """They are plain JSON and YAML, and choose series that have no namespace as well."""
    (group,) = yaml.safe_load((CHART / "dashboards" / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]:
        metrics = re.findall(r"\b(?:manta|ray_(?!io_))[a-z_]+", rule["expr"])
        assert rule["expr"].count('namespace=~".*"') == len(metrics) > 0, rule["alert"]
        assert {"severity"} == set(rule["labels"]) and {"summary", "description"} == set(rule["annotations"])
    board = json.loads((CHART / "dashboards" / "manta.json").read_text())
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert all(variables[name]["allValue"] == ".*" for name in ("namespace", "project", "job"))


def test_promtool_takes_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; it comes with Prometheus (apt install prometheus)")
    done = subprocess.run(
        [promtool, "check", "rules", CHART / "dashboards" / "rules.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_one() -> None:
    board = json.loads((CHART / "dashboards" / "manta.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) > 9
    drawn = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert all(target["expr"] for panel in drawn for target in panel["targets"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("typo",), 1),
        (("head", "memory"), "8Gi"),
        (("workers", 0, "gpu"), 8),
        (("workers", 0, "cpus"), "4"),
        (("workers", 0, "name"), "Not A Name"),
        (("workers", 0, "name"), "a-name-of-far-more-than-twenty"),
        (("image", "tag"), "latest"),
        (("image", "repository"), "registry.example.org/manta@sha256:1"),
        (("image", "digests", "cpu"), "sha256:123"),
        (("database", "mode"), "sqlite"),
        (("frontend", "settings"), {"database_url": "postgresql://u:p@h/d"}),
        (("frontend", "settings"), {"requests_per_s": 0}),
        (("frontend", "allowedRoots"), ["data"]),
        (("frontend", "mirrorRoots"), ["data"]),
        (("storage", "home", "accessMode"), "ReadOnlyMany"),
        (("storage", "home", "size"), "much"),
        (("storage", "objectStore", "endpoint"), "https://key:secret@minio"),
        (("networkPolicy", "operator"), []),
        (("networkPolicy", "frontendFrom"), [{}]),
        (("networkPolicy", "egress"), [{}]),
        (("networkPolicy", "egress"), [{"to": []}]),
        (("networkPolicy", "egress"), [{"port": 443}]),
        (("networkPolicy", "egress"), [{"ports": [{"protocol": "ICMP", "port": 1}]}]),
        (("nameOverride",), "a.b"),
        (("fullnameOverride",), "1lab"),
        (("jobs", "checkpointSeconds"), 1),
        (("upgrade", "strategy"), "Recreate"),
        (("head", "resources", "limits"), {"cpu": "4"}),
        (("spot", "tolerations"), [{"key": "a", "effect": "Never"}]),
    ],
)
def test_wrong_values_are_refused(path: tuple[Any, ...], value: Any) -> None:
    wrong = values("minimal")
    at: Any = wrong
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    errors = list(VALIDATOR.iter_errors(wrong))
    assert errors and all(tuple(error.absolute_path)[:1] in ((), path[:1]) for error in errors)


def test_the_readme_speaks_of_values_that_there_are() -> None:
    readme = (CHART / "README.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert [error.message for error in VALIDATOR.iter_errors(DEFAULTS | _over(DEFAULTS, yaml.safe_load(example)))] == []
    sections = "|".join(DEFAULTS)
    for path in re.findall(rf"`((?:{sections})\.[\w.]+)`", readme):
        at: Any = DEFAULTS
        for key in path.split("."):
            assert key in at, f"{path} is no value"
            at = at[key]


def _over(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _over(below.get(key), value) for key, value in above.items()}


def test_what_probes_ask_needs_no_token() -> None:
    """Kubernetes has none; the agent of Ray answers these paths to everybody, at its default port."""
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    from cluster.health import AGENT_PORT

    paths = set(re.findall(r'"path" "(/api/[a-z_]+)"', TEMPLATES))
    assert paths and paths <= set(PUBLIC_EXACT_PATHS)
    assert {int(port) for port in re.findall(r"port: (52\d+)", TEMPLATES)} == {DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}
    assert AGENT_PORT == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT


def test_the_variables_of_ray_are_read_by_it(tmp_path: Path) -> None:
    import ray

    from cluster import embedded
    from tests.cluster.test_embedded import head_of

    root = Path(ray.__file__).parent
    files = ["_private/ray_constants.py", "train/v2/_internal/constants.py", "dashboard/modules/job/common.py"]
    files += ["dashboard/modules/job/job_manager.py", "dashboard/modules/job/job_supervisor.py", "dashboard/consts.py"]
    sources = "\n".join((root / name).read_text() for name in files if (root / name).exists())
    names = set(re.findall(r"name: (RAY_\w+)", TEMPLATES))
    assert len(names) > 5
    assert {name for name in names if name not in sources} <= set(embedded.environment(head_of(tmp_path)))
