# Everything runs in an environment of its own, .venv, made on first use (some minutes, 11 GB: SGLang brings torch).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two at a time, files one by one, servers first: a server that starts or stops mostly waits or keeps one core busy.
TOGETHER := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast test-gpu test-gpus test-models test-models-gpu test-serving test-kits smoke lint types clean

demo: $(VENV)/.installed  ## serve a small MoE model with DWDP on this machine's CPU
	$(BIN)/sglang-dwdp demo

test: $(VENV)/.installed  ## all tests, with real servers on the CPU engine
	$(BIN)/python -m pytest $(TOGETHER)

test-fast: $(VENV)/.installed  ## the tests that start no server
	$(BIN)/python -m pytest $(TOGETHER) -m "not e2e"

test-serving: $(VENV)/.installed  ## a prefill server with DWDP beside a decode server; mixed chunks; the driver of engines
	$(BIN)/python -m pytest -m serving

test-kits: $(VENV)/.installed  ## SGLang's own test kits against two DWDP ranks, about 8 minutes
	for file in tests/kits/test_*.py; do $(BIN)/python -m pytest -m kits $$file || exit 1; done

test-models: $(VENV)/.installed  ## more model families on real servers, about a minute for each server
	$(BIN)/python -m pytest -m "models and not gpu"

test-models-gpu: $(VENV)/.installed  ## all model families on engines that share the GPUs there are
	$(BIN)/python -m pytest -m "models and gpu"

test-gpu: $(VENV)/.installed  ## the tests that need a GPU; one is enough, its ranks share it
	$(BIN)/python -m pytest -m gpu

test-gpus: $(VENV)/.installed  ## the tests that need two GPUs or more
	$(BIN)/python -m pytest -m gpus

smoke: $(VENV)/.installed  ## two small servers under SGLang's serving benchmark; report in out/serving/smoke_cpu
	rm -rf out/serving/smoke_cpu
	$(BIN)/python benchmarks/compare_serving.py benchmarks/scenarios/serving/smoke_cpu.yaml --out out/serving/smoke_cpu

lint: $(VENV)/.installed  ## style, and which layer may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
