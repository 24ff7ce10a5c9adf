# What a user types. Everything is installed into .venv beside this file, with the versions of constraints.txt.
#
# Without an NVIDIA GPU, install PyTorch's CPU build, which saves several GB: its installation page names the package
# index to give, such as  make sweep PIP_FLAGS="--extra-index-url URL"

PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=
# Test processes: one more than CI has cores, since some tests wait for others to hang.
TEST_PROCESSES ?= 3
BIN := .venv/bin
# Compiling everything takes pip a minute; Python compiles what is used when it is first used.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt \
	$(PIP_FLAGS)
# Where Python may keep nothing, each of the many processes of sweeps and tests compiles torch anew, two seconds a time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: sweep ui test check format clean

sweep: .venv/installed  ## the main job: four configurations, measured, compared, in MLflow
	$(BIN)/python -m wan_sweep -m precision=fp16,bf16 offload=true,false $(ARGS)

ui: .venv/installed  ## MLflow's pages over outputs/, on this machine only
	$(BIN)/python -m wan_sweep.track.ui $(ARGS)

test: check  ## checks and all tests; what CI runs
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/installed-dev  ## format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

# PyTorch first and by itself, so that an index that has its CPU build can provide it.
.venv/installed: .venv/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable ".[dev]"
	touch $@
