"""Which variables of an environment are secrets that a job has no business with.

A job inherits the environment of the cluster's processes, and those that of the shell or pod that started them: what
belongs to the person at that shell (a token of GitHub), or to the service (the password of its database), must not come
along. What jobs read their data and report their curves by does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

OF_JOBS = ("AWS_*", "AZURE_*", "GOOGLE_*", "HF_TOKEN", "MLFLOW_*")
"""Credentials of object stores, of the Hugging Face hub and of MLflow, as their libraries name them."""
_OF_RAY = ("RAY_*", "*_proxy", "*_PROXY")
_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH_SOCK|DATABASE_URL|DSN|_PAT$|_PWD$",
    re.IGNORECASE,
)
_VALUE = re.compile(r"://[^/@\s]*:[^/@\s]+@|-----BEGIN [A-Z ]*PRIVATE KEY")  # a password in a URL, a key


def foreign(environment: Mapping[str, str], of_jobs: Sequence[str] = OF_JOBS) -> list[str]:
    """Names of variables that look like secrets, but for patterns `of_jobs`."""
    own = (*of_jobs, *_OF_RAY)
    return [
        name
        for name, value in environment.items()
        if (_NAME.search(name) or _VALUE.search(value)) and not any(fnmatchcase(name, pattern) for pattern in own)
    ]


def without_foreign(environment: Mapping[str, str], of_jobs: Sequence[str] = OF_JOBS) -> dict[str, str]:
    """The environment of a cluster: without them, and without the settings of the service, which are not for jobs."""
    left_out = {*foreign(environment, of_jobs), *(name for name in environment if name.startswith("MANTA_"))}
    return {name: value for name, value in environment.items() if name not in left_out}
