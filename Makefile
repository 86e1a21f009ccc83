# Two commands for a newcomer: `make demo` and `make test`. The rest is for contributors.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The version the tests were last seen with; any range that pyproject.toml admits will do.
TORCH ?= torch==2.13.0

.PHONY: demo test lint check clean

demo: $(VENV)/.demo
	$(BIN)/python examples/01_demo.py demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,hf]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) demo
