# Each target does all its own set-up in .venv; a second call reuses it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test benchmarks clean

demo: .venv/installed
	$(BIN)/hf-llama-sampling complete --seed 1 --max-gen-len 40 --logprobs "ROMEO:" "First Citizen:"
	$(BIN)/hf-llama-sampling parity --quick

test: .venv/tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

benchmarks: .venv/installed
	$(BIN)/pip install --quiet --constraint tests/constraints.txt --editable ".[test]"
	$(BIN)/python -m tests.benchmarks

.venv/installed: pyproject.toml tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint tests/constraints.txt --editable .
	touch $@

.venv/tests: .venv/installed
	$(BIN)/pip install --quiet --constraint tests/constraints.txt --editable ".[test,lm-eval]"
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
