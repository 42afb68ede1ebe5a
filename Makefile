# `make demo` and `make test` set everything up by themselves, in .venv, and do it again only when pyproject.toml,
# setup.py or csrc/ changed. On a variable's line below: what a caller may set.
PYTHON ?= python3#       the interpreter that makes .venv
TORCH ?=#                what pip installs first, such as torch==2.11.0; empty: by the machine, see below
PYTEST_FLAGS ?=#         more flags for pytest

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := $(VENV)/.model
SYSTEM := $(VENV)/.system

# Without an NVIDIA GPU: the torch that we test with, and Triton for the tests that interpret and compile kernels.
# Where that torch brings a Triton of its own, it stays.
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep -c GPU),0)
TORCH_HERE := torch==2.13.0
ifeq ($(shell uname -sm),Linux x86_64)
TRITON_HERE := triton==3.6.0
endif
else
TORCH_HERE := torch
endif

.PHONY: demo test test-slow lint bench gpu-check setup clean

demo: $(INSTALLED) $(MODEL)
	$(BIN)/fastmem memory demo

test: $(INSTALLED) $(MODEL) $(SYSTEM)
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_FLAGS)

test-slow: $(INSTALLED) $(MODEL) $(SYSTEM)
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_FLAGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Rows first, one after the other; then the ratios, interleaved. Both are kept under benches/results/.
bench: $(INSTALLED) $(MODEL)
	$(BIN)/python -m benches rows
	$(BIN)/python -m benches ratios

gpu-check: $(INSTALLED)
	bash benches/gpu_check.sh $(BIN)/python

setup: $(INSTALLED) $(MODEL) $(SYSTEM)

$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/*)
	@echo "Setting up $(VENV): torch and its like are downloaded, and the extensions are built; a few minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(or $(TORCH),$(TORCH_HERE))"
	$(if $(TRITON_HERE),$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON_HERE))
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# The base model goes to the user's cache, 540 MB; a second virtual environment finds it there.
$(MODEL): $(INSTALLED) fastmem/models/smollm2.py
	@echo "Looking for the base model: a download of 92 MB, once."
	$(BIN)/python -m fastmem.models.smollm2
	touch $@

# Programs that some tests start: a Redis server, and a browser without a window. RUNLEVEL=1 keeps Debian from running
# the server as a service.
$(SYSTEM): $(INSTALLED)
	@for tool in redis-server chromium; do \
	  command -v $$tool > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
	    export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive && \
	    { apt-get install -qq -y $$tool || { apt-get update -qq && apt-get install -qq -y $$tool; }; } > /dev/null 2>&1; } \
	  || echo "$$tool is missing and cannot be installed here: the tests that need it are skipped"; \
	done
	touch $@

clean:
	rm -rf build dist *.egg-info fastmem/*.so $(INSTALLED) $(MODEL) $(SYSTEM)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
