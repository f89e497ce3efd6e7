PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test test-slow test-floats lint clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/rl-llm train quickstart --output runs/quickstart
	$(BIN)/rl-llm replay runs/quickstart --weights facts=1,sentence=1,brevity=1
	$(BIN)/rl-llm replay runs/quickstart --weights facts=1,sentence=0,brevity=0

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

# Other kernels round otherwise; what is learned must not hang on it.
test-floats: install
	$(BIN)/python -m pytest -m learning --seeds 5
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -m learning --seeds 5
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -m learning --seeds 5

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs build *.egg-info
