# Tasks of a checkout. `make venv` once; then `make test`. PYTHON selects the interpreter of the environment.
PYTHON ?= python3
BIN := .venv/bin
API := attention attention.implementations attention.measure attention.masks

.PHONY: help venv test test-thorough test-slow test-gpu fuzz lint format bench docs manual dist clean

help:  ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-15s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(BIN)/pytest  ## create .venv with everything that development needs

$(BIN)/pytest:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[cpu,test]'

test: venv  ## the default tests, two processes
	$(BIN)/pytest

test-thorough: venv  ## tests of about a second that the default ones leave out
	$(BIN)/pytest -m thorough

test-slow: venv  ## tests that take long or need a quiet machine, one process
	$(BIN)/pytest -m slow -n 0

test-gpu:  ## tests that need a CUDA device; uses the environment's python, with '.[cuda13,test]' installed
	$(PYTHON) -m pytest -m gpu -n 0

fuzz: venv  ## random calls against float64 for a minute; SEED selects other cases
	$(BIN)/python -m tests.fuzz --family broad --mode forward --seed $(or $(SEED),1) --count 1000 --processes 2 --seconds 60

lint: venv  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv  ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv  ## the CPU kernel against its peers and its targets
	$(BIN)/python -m benchmarks.cpu

docs: venv  ## the API pages, into build/api; warnings are errors
	$(BIN)/python -W error -m pdoc --docformat google --output-directory build/api $(API)

manual: venv  ## the manual page, docs/fatui.1, from the options of the commands
	$(BIN)/pip install --quiet --editable '.[release]'
	$(BIN)/python -m tests.support.manual

dist: venv  ## the wheel and the source archive, into dist, checked
	rm -rf dist
	$(BIN)/pip install --quiet --editable '.[release]'
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf .venv build dist
