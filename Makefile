# `make demo` and `make test` set up VENV by themselves; nothing but Python with pip is needed before.
PYTHON ?= python3
VENV ?= .venv
# Further words for pytest, such as PYTEST="tests/unit -x".
PYTEST ?=

# Strikes at real runs; 100 take about 40 minutes on two cores.
STRIKES ?= 100
SEED ?= 0

.PHONY: demo test chaos lint setup

demo: setup
	$(VENV)/bin/sft-dist run smollm2-135m/sft-python-docs output.overwrite=true

test: setup
	$(VENV)/bin/python -m pytest $(PYTEST)

chaos: setup
	$(VENV)/bin/python -m tests.distributed.chaos --strikes $(STRIKES) --seed $(SEED)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

setup:
	@$(PYTHON) launch/bootstrap.py $(VENV)
