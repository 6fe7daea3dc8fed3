# Everything runs in .venv, made by the first command that needs it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint type bench bench-ops bench-objectives bench-throughput bench-backbones bench-eval bench-attribution bench-gpu docs clean

VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m

help: ## list these commands
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{ printf "make %-16s %s\n", $$1, $$2 }'

setup: $(VENV)/.installed-dev ## .venv with heatssl and the tools of its developers

demo: $(VENV)/.installed ## pretrain, evaluate, attribute and report on generated images: about 5 minutes
	$(BIN)/heatssl demo

test: $(VENV)/.installed-dev ## the test suite; every line of heatssl/heat must be run by it
	$(RUN) pytest --cov=heatssl.heat --cov-fail-under=100

test-all: $(VENV)/.installed-dev ## the test suite with its slow tests
	$(RUN) pytest -m "slow or not slow" --cov=heatssl --durations=10

lint: $(VENV)/.installed-dev ## ruff (rules and layout) and the direction of imports
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(BIN)/lint-imports

type: $(VENV)/.installed-dev ## mypy
	$(RUN) mypy

bench: $(VENV)/.installed-dev ## run every benchmark, hours; results go to benchmarks/results
	@set -e; for script in benchmarks/*.py; do \
		[ -e "$$script" ] || { echo "benchmarks/ holds no script"; continue; }; \
		echo "== $$script"; $(BIN)/python "$$script"; done

bench-ops: $(VENV)/.installed-dev ## the fused operations beside plain torch and kornia, two threads: about 3 minutes
	$(BIN)/python benchmarks/ops.py

bench-objectives: $(VENV)/.installed-dev ## every objective for 10 minutes on the scenes, three seeds: about 6 hours
	$(BIN)/python benchmarks/objectives.py

bench-throughput: $(VENV)/.installed-dev ## training steps of every objective at 224 px: about 20 minutes on a CPU
	$(BIN)/python benchmarks/throughput.py

bench-backbones: $(VENV)/.installed-dev ## GAU, FLASH, RoFormerV2 and ViT at 49 to 16,384 tokens, on a CPU to 1,024: about 10 minutes
	$(BIN)/python benchmarks/backbones.py
	$(BIN)/python benchmarks/attention.py

bench-eval: $(VENV)/.installed-dev ## the linear probe beside scikit-learn's on 50,000 features: about 5 minutes
	$(BIN)/python benchmarks/evaluation.py

bench-attribution: $(VENV)/.installed-dev ## heatmaps beside pytorch-grad-cam and captum, one thread: about 7 minutes
	$(BIN)/python benchmarks/attribution.py

bench-gpu: $(VENV)/.installed-dev ## all that needs a GPU: kernels, backbones to 16,384 tokens, and with DATA=imagenette96.tar Benchmark B
	@$(BIN)/python -c "import torch; torch.cuda.is_available() or exit('bench-gpu needs a CUDA device; torch sees none')"
	$(RUN) pytest tests/ops -k on_a_gpu
	$(BIN)/python benchmarks/ops.py
	$(BIN)/python benchmarks/backbones.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/throughput.py
	$(if $(DATA),$(BIN)/python benchmarks/objectives.py --accelerator gpu --final --data imagenette --root $(DATA))

docs: $(VENV)/.installed-dev ## check that links and shell blocks of README and docs fit the code
	$(BIN)/python tools/check_docs.py

clean: ## remove .venv, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist .coverage .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# The first of these that runs and is new enough; name another with `make PYTHON=/path/to/python demo`.
$(BIN)/python:
	@set -e; \
	for python in $(PYTHON) python3.13 python3.12 python3.11 python3 python; do \
		if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
			echo "== $$($$python --version) -> $(VENV)"; \
			$$python -m venv $(VENV) && exit 0; \
			rm -rf $(VENV); \
			echo "$$python cannot make virtual environments: install its venv package (apt install python3-venv)" >&2; \
			exit 1; \
		fi; \
	done; \
	echo "heatssl needs Python 3.11, 3.12 or 3.13: install one, or name it with make PYTHON=/path/to/python" >&2; \
	exit 1

# Stamps: an install is repeated only when what it depends on has changed.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(RUN) pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(RUN) pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed
