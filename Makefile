# Each target does all its own set-up in .venv; a second call reuses it.
PYTHON ?= python3
BIN := .venv/bin
# Tests that share a costly fixture run on one worker, see tests/conftest.py.
WORKERS := --numprocesses logical --maxprocesses 8 --dist loadgroup

.PHONY: demo test test-fast test-long test-families test-processors soak structure benchmarks wheel-test matrix test-neighbours clean

demo: .venv/installed
	$(BIN)/python examples/demo.py build/demo

test: .venv/tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(WORKERS)

# Without what starts a second process, trains, builds, needs the real weights or tries many cases: about a minute.
test-fast: .venv/tests
	$(BIN)/python -m pytest $(WORKERS) -m "not (launches or trains or builds or weights or slow or hypothesis)"

# The properties, on other and more examples at each call.
test-long: .venv/tests
	$(BIN)/python -m pytest $(WORKERS) -m hypothesis --hypothesis-profile long

# What a row's independence is held by, on all families of the kit instead of one of each kind.
test-families: .venv/tests
	FAMILIES=all $(BIN)/python -m pytest $(WORKERS) tests/families

# The tests that compare numbers, under each instruction set that this processor has.
test-processors: .venv/tests
	$(BIN)/python -m tests.processors $(WORKERS)

# Random calls for 30 minutes, or SOAK_MINUTES: memory, files and threads must not grow.
soak: .venv/tests
	$(BIN)/python -m tests.soak

# The tests against the built wheel, installed where there is no source tree.
wheel-test: .venv/tests
	$(BIN)/python -m tests.wheel build/wheel-test $(WORKERS)

# Our models under TRL, torchao, Ray and a code generator: gigabytes, in an environment of its own.
test-neighbours: .venv-neighbours/installed
	.venv-neighbours/bin/python -m pytest -m "neighbours or not neighbours" tests/neighbours

# The tests on other releases of transformers and torch, each in an environment of its own: some ten minutes each.
matrix: .venv/tests
	$(BIN)/python -m tests.matrix -- $(WORKERS)

structure:
	$(PYTHON) -m tests.structure

benchmarks: .venv/tests
	$(BIN)/python -m tests.benchmarks

.venv/installed: pyproject.toml tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint tests/constraints.txt --editable ".[report]"
	touch $@

.venv/tests: .venv/installed
	$(BIN)/pip install --quiet --constraint tests/constraints.txt --editable ".[test,lm-eval]"
	touch $@

.venv-neighbours/installed: pyproject.toml tests/constraints.txt
	test -x .venv-neighbours/bin/python || $(PYTHON) -m venv .venv-neighbours
	.venv-neighbours/bin/pip install --quiet --constraint tests/constraints.txt --editable ".[test,ray,neighbours]"
	touch $@

clean:
	rm -rf .venv .venv-neighbours build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
