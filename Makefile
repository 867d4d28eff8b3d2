# One virtual environment, made on first use; every target needs only Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a worker: threads of several processes on the same cores slow each other down tenfold.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15 --durations-min=5

.PHONY: help install lock demo test compiled instructions lanes newest lint docs bench bench-peers bench-gpu gpu-check aot \
	evidence evidence-quick clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install:  ## make .venv with the locked versions of everything for development
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nl-kernels needs Python >= 3.10; set PYTHON=")'
	@$(PYTHON) -m tools.environment $(VENV)

lock: install  ## make constraints.txt anew: the newest versions that setup.py allows (torch, triton: constraints.in)
	$(BIN)/python -m tools.lock

demo: install  ## train, compare, generate and profile a small Hope on real text (about 4 minutes)
	$(BIN)/python -m nl_models.demo --output runs/demo

# Four processes: what interprets, compiles and emulates Triton kernels cannot share one.
test: install  ## run the tests, two at a time (WORKERS=)
	$(PYTEST) -m "not interpreter and not aot and not compiled"
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter
	$(PYTEST) -m aot
	$(PYTEST) -m compiled

compiled: install  ## run every kernel as compiled, in bf16, fp16 and fp32, on the CPU (tools/ptx_emulator)
	$(PYTEST) -m compiled --slow

instructions: install  ## count what every compiled kernel executes, into docs/compiled_kernels.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.ptx_emulator.instructions

# Beside the locked versions, which alone decide: what the ranges of setup.py promise. LANES= chooses.
lanes: install  ## the model tests with the oldest and newest transformers, kernels with Triton 3.6 (LANES=)
	$(BIN)/python -m tools.lanes --workers $(WORKERS) $(LANES)

newest: install  ## what the newest transformers breaks, if it is not the locked one; a report that never fails
	$(BIN)/python -m tools.lanes --workers $(WORKERS) --report

lint: install  ## check style, formatting, and the types of the public API
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## the pages as a site, into site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

bench: install  ## time the ops on the CPU against their references and the installed peers
	$(BIN)/python -m benchmarks.run --device cpu

bench-peers: install  ## the same beside other packages, in an environment of their own (.venv-peers)
	$(BIN)/python -m benchmarks.peers_env

bench-gpu: install  ## the ops on the CUDA device, beside flash-linear-attention where installed
	$(BIN)/python -m benchmarks.run --device cuda

gpu-check: install  ## ten minutes on a CUDA device: doctor, error budgets, times, tests; results in runs/gpu_check
	$(BIN)/python -m benchmarks.gpu_check

aot: install  ## compile every kernel for every target and print registers, spills and shared memory
	$(BIN)/python -m tools.kernel_report
	$(BIN)/python -m benchmarks.peer_kernels

evidence: install  ## every study of docs/evidence.md, then its tables and pictures; goes on where it stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m evaluations all

evidence-quick: install  ## the same at small sizes, into runs/evidence_quick (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m evaluations all --quick

clean:  ## remove the environment, build outputs and caches (runs/ is kept)
	rm -rf $(VENV) .venv-lanes .venv-peers build dist site src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
