# Everything a newcomer and CI need. `make test` sets up on a fresh machine and runs the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: talk test test-long check parity bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt Resemblyzer  # what it asks for needs a compiler
	touch $@

## a spoken question answered by tiny, the checkpoint that comes with the package
talk: $(STAMP)
	$(BIN)/antiphon talk examples/question.wav -o reply.wav

## the default suite (two processes of one thread each: small tensors gain nothing from two threads)
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

## every combination: shapes x durations x turns x clips
test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m long

## style and types
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

## antiphon verify on the six random checkpoints (the README's parity table)
parity: $(STAMP)
	$(BIN)/python -m tests.parity_table

## the engine under load (docs/performance.md), frames per second over transformers, and what the peak so far changes
bench: $(STAMP)
	$(BIN)/antiphon bench tiny --question examples/question.wav
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.vs_transformers
	$(BIN)/python -m benchmarks.front_end_peak

clean:
	rm -rf $(VENV) build dist *.egg-info
