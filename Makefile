# One command for each habit. Every target sets the environment up first, once, and again when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_PARALLEL ?= -n auto --maxprocesses 8 --dist loadfile
# Small factorizations on the CPU are many times slower where OpenBLAS's threads compete with other processes.
export OPENBLAS_NUM_THREADS ?= 1
BIN := $(VENV)/bin
STAMP := $(VENV)/.tdlrt-installed

.PHONY: help setup train show benchmark peers onnx notebooks docs test kills soak compatibility gpu properties lint format types clean
.DEFAULT_GOAL := help

help: ## this list
	@echo "make TARGET [ARGS=\"...\"]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-12s%s\n", $$1, $$2 }'

$(STAMP): pyproject.toml scripts/setup
	PYTHON="$(PYTHON)" scripts/setup "$(VENV)"
	@touch $@

setup: $(STAMP) ## create .venv and install the project with its development tools

train: $(STAMP) ## train a network; ARGS="--epochs 3" passes options, ARGS=--help lists them
	$(BIN)/python -m experiments.train $(ARGS)

show: $(STAMP) ## tables and plots of runs; ARGS="runs/NAME experiments/results/..."
	$(BIN)/python -m experiments.show $(ARGS)

benchmark: $(STAMP) ## measure what training and inference cost; ARGS=--help lists the options
	$(BIN)/python -m benchmarks.run $(ARGS)

peers: ## PyTorch and tensorly-torch in an environment of their own (.venv-peers), for the benchmark
	PYTHON="$(PYTHON)" scripts/peers

onnx: ## check ONNX exports in an environment of their own (.venv-onnx)
	PYTHON="$(PYTHON)" scripts/onnx_check

notebooks: $(STAMP) ## run the notebooks and refresh their outputs; ARGS=notebooks/NAME.py for single ones
	$(BIN)/python scripts/notebooks.py $(ARGS)

docs: $(STAMP) ## build the documentation, docs/_build/index.html; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs docs/_build

test: $(STAMP) ## run the tests; ARGS="-k data" passes options to pytest
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) $(ARGS)

properties: $(STAMP) ## ten thousand and more random cases, hours; goes on where it was stopped, ARGS=--fresh begins anew
	$(BIN)/python scripts/properties.py $(ARGS)

kills: $(STAMP) ## kill runs at random moments, 50 times, and compare how they end; ARGS=--help lists the options
	$(BIN)/python -m reliability.kills --output reliability/results/kills.json $(ARGS)

soak: $(STAMP) ## train for an hour while ranks and capacities move, and look for what grows
	$(BIN)/python -m reliability.soak --output reliability/results/soak.json $(ARGS)

compatibility: $(STAMP) ## the tests on the oldest and the newest versions and Pythons, hours; goes on where it was stopped
	$(BIN)/python -m reliability.compatibility $(ARGS)

gpu: $(STAMP) ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(STAMP) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## put the code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## check the types
	$(BIN)/mypy

clean: ## remove caches and build outputs; the environment and runs/ stay
	rm -rf build dist docs/_build docs/jupyter_execute docs/notebooks .pytest_cache .ruff_cache .mypy_cache .hypothesis .jax_cache .coverage *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './.git/*' -prune -exec rm -rf {} +
