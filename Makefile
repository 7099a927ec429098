# `make demo` and `make test` do all their own set-up in .venv. Windows without make: see README, "Without make".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
CONTRACTS := tests/test_architecture.py tests/test_contributing.py tests/config tests/contracts tests/method

.PHONY: demo app check test clean

demo: $(STAMP)
	$(BIN)/python -m flatlora_diffusion compare --preset demo

app: $(STAMP)
	$(BIN)/python -m app

# Lint, types and the fast contracts: what to run after each change. `make test` runs everything.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(WORKERS) -m "not slow" $(CONTRACTS)

# A file's tests share their trained runs, so they stay in one process; tests/conftest.py has the longest files first.
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(WORKERS)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev,recipe]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
