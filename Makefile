# Each target installs what it needs first; `make install` returns at once when all of it is there.
.PHONY: help install demo stack test test-faults bench lint
PYTHON := .venv/bin/python
# Processes of tests, each with servers of its own; 0 is this one, as -s and --pdb want it. Tests wait more than they compute.
PARALLEL = -n $(JOBS) --dist worksteal
test: JOBS ?= 2
test-faults: JOBS ?= 3

help:
	@echo "make demo         the whole pipeline with simulated devices (DEMO_SECONDS=n: end by itself)"
	@echo "make stack        only Kafka, PostgreSQL, Valkey, an MQTT broker and an SMTP inbox (HEADRACE_STATE: its folder)"
	@echo "make test         the default test suite"
	@echo "make test-faults  the suite that kills real processes (FAULTS=short: a few minutes)"
	@echo "                  both: JOBS=n processes of tests at a time (2, faults 3; 0: one, for PYTEST_ARGS=-s)"
	@echo "make bench        the benchmarks, written under bench/results/"
	@echo "make lint         ruff and mypy"
	@echo "make install      .venv/ with everything that these need"

install:
	@sh tools/bootstrap.sh

demo: install
	@$(PYTHON) -m tools.demo

stack: install
	@$(PYTHON) -m tools.stack $(STACK_ARGS)

test: install
	@$(PYTHON) -m pytest -m "not faults" $(PARALLEL) $(PYTEST_ARGS)

test-faults: install
	@$(PYTHON) -m pytest tests/faults -m faults $(PARALLEL) $(PYTEST_ARGS)

bench: install
	@$(PYTHON) -m bench

lint: install
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m mypy
