# Everything happens in .venv, which pip builds from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# Two processes share the tests, by file, since fixtures of a file are shared; slow files first, and files that share
# daemons in one process (tests/conftest.py).
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Tests must neither reach for a hub nor report usage.
OFFLINE := HF_HUB_OFFLINE=1 FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0

.DEFAULT_GOAL := help
.PHONY: help install dev quickstart test docs golden build check-wheel test-unaligned test-deployment clean

help:  ## Show the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed  ## Install fedlora into .venv.

dev: .venv/.installed-dev  ## Install with the development tools, such as pytest and ruff.

quickstart: .venv/.installed  ## Install, then run experiments/quickstart.toml into runs/quickstart.
	$(BIN)/fedlora run experiments/quickstart.toml

test: .venv/.installed-dev  ## Install with the development tools, then run every check.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(OFFLINE) $(PYTEST)

docs: .venv/.installed-docs  ## Build the documentation into build/site; warnings are errors.
	$(OFFLINE) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

golden: .venv/.installed-dev  ## Compare short runs, bit for bit, with the commit in tests/golden/REFERENCE.
	$(OFFLINE) $(BIN)/python -m tests.golden

build: .venv/.installed-dev  ## Make the source distribution, and the wheel from it, in dist/.
	rm -rf dist
	$(BIN)/python -m build --outdir dist

check-wheel: build  ## Install that wheel into an empty environment, and run the quickstart's first rounds from it.
	$(PYTHON) tests/check_wheel.py dist/fedlora-*.whl --rounds 2

test-unaligned: .venv/.installed-dev  ## Run the tests with weights where files and processors differ: 8, 24, 40 modulo 64.
	for offset in 8 24 40; do $(OFFLINE) $(PYTEST) --weight-offset $$offset || exit 1; done

test-deployment: .venv/.installed-dev  ## Test real nodes on this machine, with what happens when parts of them die.
	$(OFFLINE) $(BIN)/pytest tests/deployment tests/test_flower_runtime.py -m "federation or not federation"

clean:  ## Remove .venv, build output and caches; runs/ stays.
	rm -rf .venv build dist *.egg-info *.fab .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

# A stamp a set of extras: pip runs again only when the requirements change.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) --editable .
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) --editable ".[dev,tensorboard,wandb,mlflow,evaluation]"
	touch $@ .venv/.installed

.venv/.installed-docs: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) --editable ".[docs]"
	touch $@ .venv/.installed
