# `make demo` and `make test` do all their own set-up in .venv. Without make: see CONTRIBUTING.md.
PYTHON ?= python3
# The versions last tested; `make LOCK= ...` takes the newest that pyproject.toml allows.
LOCK ?= requirements.lock
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
LONGER := base_weights dora low_precision paper_analysis placement quantized rivals saved_tensors waits
CONTRACTS := tests/test_architecture.py tests/test_contributing.py tests/config tests/contracts tests/method \
	$(LONGER:%=--ignore=tests/contracts/test_%.py)
LINT := $(BIN)/ruff check --no-cache . && $(BIN)/ruff format --check . && $(BIN)/mypy

.PHONY: demo app check test test-long test-all durations docs firefox lock clean

# pytest with arguments $(1), and lint and types beside it: their output comes as one block, and both exit codes count.
define tests_and_lint
@{ said="$$({ $(LINT); } 2>&1)"; code=$$?; printf '\n%s\n' "$$said"; exit $$code; } & lint=$$!; \
	$(BIN)/python -m pytest $(WORKERS) $(1); tests=$$?; \
	wait $$lint || { echo 'ruff or mypy failed: see its lines above'; exit 1; }; exit $$tests
endef

demo: $(STAMP)
	$(BIN)/flatlora demo

app: $(STAMP)
	$(BIN)/flatlora app

# Lint, types and the fast contracts: what to run after each change. `make test` has the longer contracts too.
check: $(STAMP)
	$(call tests_and_lint,-m "not long" $(CONTRACTS))

# A file's tests share their trained runs, so they stay in one process; tests/conftest.py has the longest files first.
test: $(STAMP)
	$(call tests_and_lint,-m "not long")

# What takes long: the soak, an installed wheel, two processes, large files, the app in a browser.
test-long: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) -m long

test-all: test test-long

# The seconds that each test file takes, for the order in which they start: to be run on a quiet machine.
durations: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) --junitxml=.durations.xml
	$(BIN)/python .ci/durations.py .durations.xml > tests/.durations.json
	rm .durations.xml

# The documentation as a site, in site/; a broken link is an error.
docs: $(STAMP)
	$(BIN)/python -m pip install -q $(addprefix -c ,$(LOCK)) -e '.[docs]'
	$(BIN)/mkdocs build --strict

# The app from images to a verdict once more, in an installed Firefox: `make test` takes Chromium.
firefox: $(STAMP)
	FLATLORA_BROWSER=firefox $(BIN)/python -m pytest tests/app/browser/test_story.py

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
