# Everything is installed into .venv and .venv-transformers in this folder; nothing else is touched but the kernel cache (~/.cache/shmroute).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-transformers stress clean

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

# In an environment of its own, since torch is large; of the named release, whose CPU build some hosts have at hand.
$(VENV)-transformers/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-transformers
	$(VENV)-transformers/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)-transformers/bin/pip install --quiet --disable-pip-version-check --editable '.[dev,serve]' 'openai>=2' httpx
	@touch $@

test-transformers: $(VENV)-transformers/.installed  ## set up torch and run the tests of Transformers' models and of serving
	$(VENV)-transformers/bin/pytest tests/with_torch

stress: $(VENV)/.installed  ## hours: the long searches, the long fuzzing, a thousand kills, a soak
	SHMROUTE_STRESS=1 NUMBA_DISABLE_JIT=1 $(BIN)/pytest tests/interleaving
	SHMROUTE_STRESS=1 $(BIN)/pytest tests/fuzz tests/stress/test_process_machine.py
	$(BIN)/python -m stress.chaos --kills 1000
	$(BIN)/python -m stress.soak --hours 1

clean:
	rm -rf $(VENV) $(VENV)-transformers build .interleavings.log *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
