# Everything is installed into .venv in this folder; nothing else is touched but the kernel cache (~/.cache/shmroute).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test stress clean

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "shmroute needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## set up and run the main job
	$(BIN)/shmroute demo

test: $(VENV)/.installed  ## set up and run the checkers and all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# The interleavings need interpreted kernels, and so a pytest of their own; it has the second core.
	NUMBA_DISABLE_JIT=1 $(BIN)/pytest tests/interleaving > .interleavings.log 2>&1 & interleavings=$$!; \
	$(BIN)/pytest; compiled=$$?; \
	wait $$interleavings; interpreted=$$?; \
	cat .interleavings.log; exit $$((compiled || interpreted))

stress: $(VENV)/.installed  ## hours: the long searches, the long fuzzing, a thousand kills, a soak
	SHMROUTE_STRESS=1 NUMBA_DISABLE_JIT=1 $(BIN)/pytest tests/interleaving
	SHMROUTE_STRESS=1 $(BIN)/pytest tests/fuzz tests/stress/test_process_machine.py
	$(BIN)/python -m stress.chaos --kills 1000
	$(BIN)/python -m stress.soak --hours 1

clean:
	rm -rf $(VENV) build .interleavings.log *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
