# One verb each; every verb sets up .venv by itself and is quick when that is done. CI calls `make test`.
#   make demo     search real networks on this machine: profile, search, train the front, write the page (11 to 19 minutes)
#   make test     the tests that need no network, GPU or data       make check    lint, format, types
#   make bench    the benchmark BENCH=FILE, or all (hours)          make report   write the page of STUDY again
#   make clean    remove caches and build outputs; .venv and studies stay

PYTHON ?= python3
STUDY ?= demo
PYTEST_FLAGS ?= -n 2
BENCH ?= $(filter-out benchmarks/make_% benchmarks/network_pool.py,$(wildcard benchmarks/*.py))

BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check bench report clean

help:
	@sed -n 's/^#   //p' Makefile

demo: .venv/.ready
	$(BIN)/lowsearch run --objective acc-latency --study $(STUDY)
	@echo "open $(CURDIR)/studies/$(STUDY)/report.html"

test: .venv/.ready-dev
	$(BIN)/python -m pytest -q $(PYTEST_FLAGS)

check: .venv/.ready-dev
	$(BIN)/ruff check lowsearch tests benchmarks docs
	$(BIN)/ruff format --check lowsearch tests benchmarks docs
	$(BIN)/pyright

bench: .venv/.ready-dev
	@set -e; for script in $(BENCH); do echo "== $$script"; $(BIN)/python $$script; done

report: .venv/.ready
	$(BIN)/lowsearch report $(STUDY)

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find lowsearch tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

# The development set-up holds everything that the plain one does, so either stamp serves `demo` and `report`.
.venv/.ready: pyproject.toml | $(BIN)/python
	@echo "Installing lowsearch into .venv (once; PyTorch makes it a large download)"
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/.ready-dev: pyproject.toml | $(BIN)/python
	@echo "Installing lowsearch and its development tools into .venv (once; PyTorch makes it a large download)"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch .venv/.ready $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "lowsearch needs Python 3.11 or newer as '$(PYTHON)'; hint: make PYTHON=python3.12" >&2; exit 2; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv .venv; \
	elif $(PYTHON) -c 'import virtualenv' 2>/dev/null; then $(PYTHON) -m virtualenv --quiet .venv; \
	else version=$$($(PYTHON) -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")'); \
	  echo "this Python cannot make environments: ensurepip is missing; hint: sudo apt install python$$version-venv" >&2; exit 2; fi
