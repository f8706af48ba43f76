# saeserve: `make serve` runs the service on the builtin model, `make test` runs the tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help install install-dev serve test test-older-cpu lint proto proto-check bench bench-training builtin-figures clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "saeserve needs Python 3.11 or newer, found " + sys.version.split()[0] + "; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.installed $@

install: $(VENV)/.installed ## make .venv with what the service needs

install-dev: $(VENV)/.installed-dev ## and with what tests, lint and code generation need

serve: install ## run the service in the foreground: gRPC 127.0.0.1:9000, HTTP :8000 (ARGS="--grpc-port 9001 ...")
	@exec $(BIN)/saeserve serve $(ARGS)

test: install-dev ## run the tests (ARGS="-k name ...")
	$(BIN)/python -m pytest $(ARGS)

# Instructions of an older CPU, with which sums are rounded otherwise than in `make test`: AVX2 where there is more, else
# SSE4. PyTorch, MKL and oneDNN choose theirs one by one.
OLDER_CPU := $(shell grep -qw avx512f /proc/cpuinfo 2>/dev/null \
	&& echo ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
	|| echo ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41)
NUMERIC_TESTS := tests/sae_runtime tests/service/engine tests/service/rpc

test-older-cpu: install-dev ## run the numeric tests with the instructions of an older CPU (3 minutes)
	env $(OLDER_CPU) $(BIN)/python -m pytest $(NUMERIC_TESTS) -m 'not any_cpu' $(ARGS)

lint: install-dev ## formatting, lint, types, import contracts, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

proto: install-dev ## write service/pb from protos/, and the blocking client from the asyncio one
	$(BIN)/python protos/generate.py
	$(BIN)/python protos/generate_sync.py

proto-check: install-dev
	$(BIN)/python protos/generate.py --check
	$(BIN)/python protos/generate_sync.py --check

bench: install ## measure the service against bare PyTorch; writes build/bench.json (10 to 15 minutes)
	$(BIN)/python -m loadtests.bench --out build/bench.json

bench-training: install ## measure the trainers against other projects' (ARGS="--only speed"); writes build/bench-training.json
	$(BIN)/python -m loadtests.training_bench --out build/bench-training.json $(ARGS)

builtin-figures: install ## recompute the figures of the builtin model and its dictionaries
	$(BIN)/python -m sae_runtime.builtin.figures

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
