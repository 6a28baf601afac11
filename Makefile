PYTHON ?= python3
VENV ?= .venv
DATA ?=
BENCH_DATA ?= $(DATA)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers

.PHONY: demo test test-long bench bench-full format dist clean

demo: $(READY)
	$(BIN)/python demo/demo.py $(if $(DATA),--data "$(DATA)")

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2

test-long: $(READY)
	$(BIN)/python -m pytest -m long

bench: $(PEERS)
	$(BIN)/python benchmarks/run.py $(if $(BENCH_DATA),--data "$(BENCH_DATA)")

bench-full: $(PEERS)
	$(BIN)/python benchmarks/run.py --full $(if $(BENCH_DATA),--data "$(BENCH_DATA)")

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: $(READY)
	$(BIN)/python -m build

$(READY): settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(READY)

$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet timm transformers torch-pruning==1.6.1
	$(BIN)/python -m pip install --quiet --no-deps torch-simplify==1.1.4
	touch $(PEERS)

clean:
	rm -rf $(VENV) build dist *.egg-info
