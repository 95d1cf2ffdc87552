# Two commands, each doing all its own set-up on a machine with Python 3.11 and make.
PYTHON ?= python3
TASK ?= motor_detection
VENV := .venv
RUN := $(VENV)/bin/python
# waiting threads of torch spin for some 50 microseconds, then sleep: sleeping at once costs a third of the speed, spinning
# on and on makes two programs on the same cores crawl
export GOMP_SPINCOUNT := 20000

.PHONY: demo test lint clean

demo: $(VENV)/core  ## simulate data, train and evaluate a task: make demo TASK=motor_detection
	@test -f $(TASK)/train.py || { echo "error: TASK=$(TASK): no such task here (no $(TASK)/train.py)"; exit 2; }
	$(RUN) $(TASK)/train.py
	$(RUN) $(TASK)/eval.py

test: $(VENV)/tests  ## the quick test suite, a process per core
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4

lint: $(VENV)/tests  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/core: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: expected Python 3.11 or newer; give one: make demo PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/tests: $(VENV)/core requirements-extras.txt tests/requirements.txt
	$(RUN) -m pip install --quiet --requirement requirements-extras.txt --requirement tests/requirements.txt
	touch $@

clean:  ## remove the virtual environment (runs and generated data stay)
	rm -rf $(VENV)
