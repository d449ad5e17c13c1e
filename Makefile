# Two commands set everything up: `make demo` and `make test`. Each makes .venv if there is none.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-hosts lint bench bench-gpu clean

demo: $(VENV)/ready
	$(VENV)/bin/riskpo train $(ARGS)

test: $(VENV)/ready lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --benchmark-disable -n auto --maxprocesses 4 $(ARGS)
	$(PY) -m tools.compile_check

# Contract tests of hosts whose pins differ from ours, in an environment of their own
VENV_HOSTS ?= .venv-hosts
HOSTS := $(VENV_HOSTS)/bin/python

test-hosts: $(VENV_HOSTS)/ready
	$(HOSTS) -m pytest --benchmark-disable tests/integrations/test_verl*.py $(ARGS)

$(VENV_HOSTS)/ready: setup.py constraints.txt constraints-hosts.txt
	$(PYTHON) -m venv $(VENV_HOSTS)
	$(HOSTS) -m pip install --quiet --upgrade pip setuptools wheel
	$(HOSTS) -m pip install --quiet -c constraints.txt torch
	$(HOSTS) -m pip install --quiet -c constraints.txt -e ".[test]"
	$(HOSTS) -m pip install --quiet --no-deps -r constraints-hosts.txt
	touch $@

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/ready
	$(PY) -m benchmarks $(ARGS)

# GPU tests, then the sweep, in less than ten minutes; JSON, log and tables in benchmarks/results
bench-gpu: $(VENV)/ready
	PYTHON=$(PY) tools/gpu_session.sh $(ARGS)

$(VENV)/ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip setuptools wheel
	$(PY) -m pip install --quiet -c constraints.txt torch
	$(PY) -m pip install --quiet -c constraints.txt -e ".[train,test]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV_HOSTS) runs build *.egg-info
