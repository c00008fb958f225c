# The same commands on a laptop and in CI. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help venv dev demo serve check test soak bench clean

help:           ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

venv: .venv/.installed       ## the environment in .venv; a second call costs nothing

dev: .venv/.installed-dev    ## the same with the tools of developers

# Stamps rather than folders: an interrupted installation is done again.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"got Python {sys.version.split()[0]}, expected 3.11 or newer; make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# What is compared with. Without its own dependencies, of which hydra has no version beside ours; its losses need none.
.venv/.installed-bench: .venv/.installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt lightly
	touch $@

demo: venv      ## the main job end to end, in minutes
	$(BIN)/manta demo

serve: venv     ## the service in the foreground, on http://127.0.0.1:8000
	$(BIN)/manta serve

check: dev      ## lint, format, types, layers, the image and the chart
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.file_lengths
	$(BIN)/hadolint cluster/Dockerfile
	$(BIN)/helm lint --quiet --strict helm/manta --values helm/manta/ci/minimal-values.yaml

# Bytecode is kept even where the machine says not to: the suite starts some hundred processes.
test: dev       ## the whole suite, on three processes of one thread each: that with the Ray cluster waits for most of its time
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --no-loadscope-reorder --durations 30

soak: dev       ## every fault at random moments for SOAK_MINUTES (30), then ordeals that take an hour; FAULTS_SEED
	$(BIN)/pytest -m soak

bench: .venv/.installed-bench      ## ratios of one run, into tests/benchmarks/RESULTS.md
	$(BIN)/python -m tests.benchmarks

clean:          ## remove the environment and what tools left
	rm -rf .venv build demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
