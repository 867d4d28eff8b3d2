# One virtual environment, made on first use; every target needs only Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a worker: threads of several processes on the same cores slow each other down tenfold.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help install demo test lint bench bench-peers bench-gpu gpu-check aot clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nl-kernels needs Python >= 3.10; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch triton
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(STAMP)  ## make .venv with everything for development

demo: $(STAMP)  ## train, compare, generate and profile a small Hope on real text (about 4 minutes)
	$(BIN)/python -m nl_models.demo --output runs/demo

# Three processes: the Triton interpreter and the ahead-of-time compiler cannot share one.
test: $(STAMP)  ## run the tests, two at a time (WORKERS=)
	$(PYTEST) -m "not interpreter and not aot"
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter
	$(PYTEST) -m aot

lint: $(STAMP)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)  ## time the ops on the CPU against their references and the installed peers
	$(BIN)/python -m benchmarks.run --device cpu

bench-peers: $(STAMP)  ## the same beside other packages, in an environment of their own (.venv-peers)
	$(BIN)/python -m benchmarks.peers_env

bench-gpu: $(STAMP)  ## the ops on the CUDA device, beside flash-linear-attention where installed
	$(BIN)/python -m benchmarks.run --device cuda

gpu-check: $(STAMP)  ## GPU tests, benchmarks, demo and profile in one run; results in runs/gpu_check
	$(BIN)/python -m benchmarks.gpu_check

aot: $(STAMP)  ## compile every kernel for every target and print registers, spills and shared memory
	$(BIN)/python -m nl_kernels.triton_support.report

clean:  ## remove the environment, build outputs and caches (runs/ is kept)
	rm -rf $(VENV) .venv-peers build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
