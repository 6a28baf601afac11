PYTHON ?= python3
VENV ?= .venv
DATA ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-long format dist clean

demo: $(READY)
	$(BIN)/python demo/demo.py $(if $(DATA),--data "$(DATA)")

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2

test-long: $(READY)
	$(BIN)/python -m pytest -m long

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

clean:
	rm -rf $(VENV) build dist *.egg-info
