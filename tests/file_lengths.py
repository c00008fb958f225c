"""Fails when a Python file is longer than a reader's patience."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIMIT = 400


def main() -> int:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], capture_output=True, text=True)
    paths = [Path(line) for line in listed.stdout.splitlines()]
    assert paths, "git lists no Python file: run this in the checkout"
    long = [(path, n) for path in paths if path.exists() and (n := len(path.read_text().splitlines())) > LIMIT]
    for path, n in long:
        print(f"{path}: got {n} lines, expected at most {LIMIT}; which two files is it?")
    return bool(long)


if __name__ == "__main__":
    sys.exit(main())
