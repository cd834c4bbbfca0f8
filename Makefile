# make demo   align the embedded model, print the before/after table and the report's path
# make test   every test but soak      make test-fast  those not marked slow
# make soak   the long runs            make lint       ruff, mypy and the layers of the imports
# make docs   the documentation site   make format     what ruff can repair by itself
# Each target does its own set-up; the second run reuses it. Options:
#   PYTHON=python3.12          the interpreter the environment is built from (>= 3.11)
#   PIP_ARGS="--index-url ..." further arguments for pip, for example an index with CPU-only builds of torch
#   TEST_ARGS="-x -k srpo"     further arguments for pytest
#   WORKERS=2                  processes that share the tests, each of one thread; 0 = this process alone
PYTHON ?= python3
PIP_ARGS ?=
TEST_ARGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := src tests tools benchmarks examples

.PHONY: demo test test-fast soak lint format docs setup clean
.DEFAULT_GOAL := demo

setup: $(STAMP) $(STAMP)-test $(STAMP)-dev $(STAMP)-docs

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("palate needs python >= 3.11, got " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (once; about a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(STAMP)-%: $(STAMP)
	@echo "installing what '$*' needs"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$*]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/palate train srpo-emoji run.folder=runs/demo --fresh
	@$(BIN)/palate evaluate runs/demo
	@$(BIN)/palate report runs/demo

test: $(STAMP)-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not soak' $(TEST_ARGS)

test-fast: $(STAMP)-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow and not soak' $(TEST_ARGS)

soak: $(STAMP)-test
	@$(BIN)/python -m pytest -m soak $(TEST_ARGS)

lint: $(STAMP)-test $(STAMP)-dev
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(STAMP)-dev
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

docs: $(STAMP)-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV) build dist src/*.egg-info
