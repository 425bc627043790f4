# What a developer types. `make demo` on a fresh machine needs Python 3.11 or newer and nothing else.

PYTHON ?= python3
# More words for the installation of torch alone, to choose a build: PIP_TORCH_ARGS="--index-url ..."
PIP_TORCH_ARGS ?=
# Words for `eurotrain demo`: ARGS=--kill-a-rank
ARGS ?=
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.stamp
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
PROCESSES := ranks or ray or demo or slurm
# Triton interprets and compiles kernels without a GPU; CPU builds of torch come without it.
TRITON := triton==3.9.0

.PHONY: help setup demo demo-slurm test lint format clean

help: ## show what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: $(STAMP) ## train one model across two local sites (ARGS=--kill-a-rank)
	$(BIN)/eurotrain demo $(ARGS)

demo-slurm: $(STAMP) ## the same across two real Slurm sites that are brought up here (root only)
	$(BIN)/python -m tests.testbed.demo

setup: $(STAMP) ## make the virtual environment .venv with all that development needs

test: lint ## lint, then all tests that this machine can run
	$(PYTEST) -n $(WORKERS) -m "not ($(PROCESSES))"
	$(PYTEST) -n 0 -m "$(PROCESSES)"

lint: $(STAMP) ## check format, style, types and the import law
	$(BIN)/ruff format --quiet --check .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## rewrite what the format and the style allow to be rewritten
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the virtual environment, caches and builds
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp goes first and comes back last. Without it an earlier attempt was cut short, and what that left
# behind is not to be trusted: everything is made anew (pip still has the downloads).
$(STAMP): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "eurotrain needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@test -e $@ || $(PYTHON) -m venv --clear .venv
	@rm -f $@
	@echo "installing into .venv: torch, then the rest (a few minutes the first time)"
	@$(INSTALL) -c constraints-cpu.txt $(PIP_TORCH_ARGS) torch
	@$(INSTALL) -c constraints-cpu.txt -e '.[dev]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(INSTALL) --no-deps $(TRITON)
	@touch $@
