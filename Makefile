# make demo   align the embedded model, print the before/after table and the report's path
# make test   run every test            make soak   the long runs            make lint   syntax and style
# Each target does its own set-up; the second run reuses it. Options:
#   PYTHON=python3.12          the interpreter the environment is built from (>= 3.11)
#   PIP_ARGS="--index-url ..." further arguments for pip, for example an index with CPU-only builds of torch
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test soak lint setup clean
.DEFAULT_GOAL := demo

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("palate needs python >= 3.11, got " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; about a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[test]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/palate train srpo-emoji run.folder=runs/demo --fresh
	@$(BIN)/palate evaluate runs/demo
	@$(BIN)/palate report runs/demo

test: $(STAMP)
	@$(BIN)/python -m pytest -m 'not soak'

soak: $(STAMP)
	@$(BIN)/python -m pytest -m soak

lint: $(STAMP)
	@$(BIN)/python -m compileall -q src tests tools benchmarks
	@awk 'length > 120 { print FILENAME ":" FNR ": longer than 120 characters"; bad = 1 } END { exit bad }' \
	  $$(find src tests tools benchmarks -name '*.py')

clean:
	rm -rf $(VENV) build dist src/*.egg-info
