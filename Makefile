# make demo · make test · make test-long · make gate · make lint. Everything lives in .venv; nothing outside this folder is written.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# gpu where a driver answers, else cpu; `make setup DEVICE=cpu` overrides.
DEVICE ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
REQUIREMENTS := $(VENV)/.requirements-$(DEVICE)
NATIVE := $(VENV)/.native
SOURCES := $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long gate bench lint format clean smollm2

help:
	@echo "make demo     set up, then train a tiny model through the three stages on CPU and draw the figures"
	@echo "make test     set up, then run the tests"
	@echo "make test-long  those that take minutes each: runs killed, stopped and continued, experiments in small"
	@echo "make gate     the kernels against benchmarks/gates.toml, and their machine code"
	@echo "make bench    the kernels beside every installed peer: a table, JSON and a plot in benchmarks/results"
	@echo "make lint     ruff"
	@echo "make setup    the private environment and the native kernels; seconds when nothing changed"
	@echo "make smollm2  convert SmolLM2-135M-Instruct to models/smollm2-135m for configs/*-smollm2.yaml"

setup: $(NATIVE)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "keju: $(PYTHON) is not Python 3.11 to 3.13; name one with: make setup PYTHON=python3.11" >&2; exit 2; }
	@echo "setup: creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(REQUIREMENTS): $(BIN)/python requirements/$(DEVICE).txt
	@echo "setup: installing locked requirements for $(DEVICE) (minutes the first time)"
	@$(PIP) install torch==2.13.0
	@$(PIP) install --no-deps -r requirements/$(DEVICE).txt
	@touch $@

$(NATIVE): $(REQUIREMENTS) setup.py pyproject.toml $(SOURCES)
	@echo "setup: building the native kernels"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

demo: setup
	@$(BIN)/python -m trainer.demo

# Two at a time, each file's tests in one process: much of the time goes to starting engines and ranks. TESTERS=0: one after the other.
TESTERS ?= 2
test: setup
	@$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile

# What takes minutes each: runs killed, stopped and continued, with vLLM beside; the experiments' quick forms.
test-long: setup
	@$(BIN)/python -m pytest -m long -n $(TESTERS) --dist loadfile

# A machine that runs other things beside, as CI's does, holds the generous limits alone.
gate: setup
	@$(BIN)/python -m benchmarks.kernels --gate $(if $(CI),--generous)

bench: setup
	@$(BIN)/python -m benchmarks.kernels --full

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

smollm2: setup
	@$(BIN)/python -m trainer.import_gguf smollm2 models/smollm2-135m

clean:
	@rm -rf $(VENV) build *.egg-info kernels/_native*.so
