# `make demo`, `make demo-rlhf` and `make test` set up VENV by themselves; nothing but Python with pip is needed before.
PYTHON ?= python3
VENV ?= .venv
# Further words for pytest, such as PYTEST="tests/unit -x".
PYTEST ?=

# Strikes at real runs; 100 take about 40 minutes on two cores.
STRIKES ?= 100
SEED ?= 0

.PHONY: demo demo-rlhf test chaos lint setup

demo: setup
	$(VENV)/bin/sft-dist run smollm2-135m/sft-python-docs output.overwrite=true

RLHF := runs/smollm2-135m-rlhf

# Begun again, it goes on where it was.
demo-rlhf: setup
	$(VENV)/bin/sft-dist pipeline smollm2-135m/python-docs-rlhf
	$(VENV)/bin/sft-dist compare $(RLHF)/sft $(RLHF)/ppo $(RLHF)/dpo --reward $(RLHF)/reward \
		--prompts 64 --max-new-tokens 64 --output $(RLHF)/comparison

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
