# What a checkout can do. `make quickstart` needs nothing but Python 3.11 or newer; the rest follows from it.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help quickstart test check slow gpu lock clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 20

# The stamps say what .venv was built from: a new lock makes it afresh, a new pyproject.toml installs kd again.
.venv/.locked: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "kd needs Python 3.11 or newer, and '$(PYTHON)' is not; name one: make quickstart PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

.venv/.installed: pyproject.toml .venv/.locked
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@

quickstart: .venv/.installed ## a sweep over temperature and alpha, and its page
	$(BIN)/kd run -m temperature=1,4,8 alpha=0.1,0.5,0.9
	$(BIN)/kd report

check: .venv/.installed ## formatting, lint, types and the fast tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(PYTEST) -q -n $(WORKERS)

test: check ## the same, as the machines run it

slow: .venv/.installed ## the tests that take minutes
	$(PYTEST) -q -m slow

gpu: .venv/.installed ## the tests that need a CUDA device
	$(PYTEST) -q -m gpu

lock: .venv/.installed ## requirements.lock for pyproject.toml as it stands; UPGRADE=1 moves every pin
	@cp requirements.lock .venv/new.lock
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --generate-hashes --no-annotate \
	  --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) --quiet -o .venv/new.lock
	@# Left untouched when nothing moved: a newer file would rebuild .venv.
	@cmp -s .venv/new.lock requirements.lock || cp .venv/new.lock requirements.lock

clean: ## everything made here but the results in .kd
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
