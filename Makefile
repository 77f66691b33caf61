# `make demo`, `make demo-rlhf` and `make test` set up VENV by themselves; nothing but Python with pip is needed before.
PYTHON ?= python3
VENV ?= .venv
# Words for pytest instead of the whole suite, such as PYTEST="tests/unit -x".
PYTEST ?=
# A folder for reports in JUnit's form.
REPORTS ?=

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
		--prompts 40 --max-new-tokens 64 --output $(RLHF)/comparison

# Tests of one process two at a time; the others have processes enough of their own.
test: setup
ifneq ($(strip $(PYTEST)),)
	$(VENV)/bin/python -m pytest $(PYTEST)
else
	@status=0; \
	$(VENV)/bin/python -m pytest -n 2 --durations=10 $(REPORTS:%=--junitxml=%/unit.xml) tests/unit || status=1; \
	$(VENV)/bin/python -m pytest --durations=15 $(REPORTS:%=--junitxml=%/processes.xml) \
		tests/distributed tests/slurm tests/gpu || status=1; \
	exit $$status
endif

chaos: setup
	$(VENV)/bin/python -m tests.distributed.chaos --strikes $(STRIKES) --seed $(SEED)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

setup:
	@$(PYTHON) launch/bootstrap.py $(VENV)
