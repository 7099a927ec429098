# `make demo` and `make test` do all their own set-up in .venv. Windows without make: see README, "Without make".
PYTHON ?= python3
# The versions last tested; `make LOCK= ...` takes the newest that pyproject.toml allows.
LOCK ?= requirements.lock
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo app test lock clean

demo: $(STAMP)
	$(BIN)/flatlora demo

app: $(STAMP)
	$(BIN)/flatlora app

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

# Into an environment of its own making it puts the PyTorch last tested too; in one that was there yours is kept.
$(STAMP): pyproject.toml setup.py $(LOCK)
	test -x $(BIN)/python || { $(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install -q pip $(if $(LOCK),$$(sed -n 's/^# \(torch.*\)/\1/p' $(LOCK))); }
	$(BIN)/python -m pip install -q $(addprefix -c ,$(LOCK)) -e '.[dev,recipe]'
	touch $(STAMP)

lock: $(STAMP)
	$(BIN)/python .ci/lock.py > $(LOCK)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
