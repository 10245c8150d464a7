# Each target does all its own set-up in .venv; a second call reuses it.
PYTHON ?= python3
BIN := .venv/bin
# Tests that share a costly fixture run on one worker, see tests/conftest.py.
WORKERS := --numprocesses logical --maxprocesses 8 --dist loadgroup

.PHONY: demo test test-fast test-long test-processors soak structure benchmarks clean

demo: .venv/installed
	$(BIN)/hf-llama-sampling complete --seed 1 --max-gen-len 40 --logprobs "ROMEO:" "First Citizen:"
	$(BIN)/hf-llama-sampling parity --quick

test: .venv/tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(WORKERS)

# Without what starts a second process, trains, builds or needs the real weights: about a minute.
test-fast: .venv/tests
	$(BIN)/python -m pytest $(WORKERS) -m "not (launches or trains or builds or weights)"

# The properties, on other and more examples at each call.
test-long: .venv/tests
	$(BIN)/python -m pytest $(WORKERS) -m hypothesis --hypothesis-profile long

# The tests that compare numbers, under each instruction set that this processor has.
test-processors: .venv/tests
	$(BIN)/python -m tests.processors $(WORKERS)

# Random calls for 30 minutes, or SOAK_MINUTES: memory, files and threads must not grow.
soak: .venv/tests
	$(BIN)/python -m tests.soak

structure:
	$(PYTHON) -m tests.structure

benchmarks: .venv/tests
	$(BIN)/python -m tests.benchmarks

.venv/installed: pyproject.toml tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint tests/constraints.txt --editable .
	touch $@

.venv/tests: .venv/installed
	$(BIN)/pip install --quiet --constraint tests/constraints.txt --editable ".[test,lm-eval]"
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
