# `make` alone prints the help. Every target installs what it needs first; nothing outside .venv is touched.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := torch>=2.9,<2.14
PYTHON ?=
ARGS ?=

.PHONY: help setup train test test-full lint format bench bench-gpu growth compare pretrain clean

help: ## print this text
	@echo 'make <target> [ARGS="algo=grpo seed=1"] [PYTHON=/path/to/python3]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install flowalign with its development tools

train: $(STAMP) ## align the embedded model: make train ARGS="algo=grpo dynamics=cps"
	$(BIN)/python train.py $(ARGS)

test: $(STAMP) ## the quick tests
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-full: $(STAMP) ## all tests, the slow ones too
	$(BIN)/python -m pytest -n auto --dist worksteal -m "slow or not slow" $(ARGS)

lint: $(STAMP) ## ruff, pyright and codespell, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell

format: $(STAMP) ## let ruff format and repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## time one epoch
	$(BIN)/python bench/epoch.py $(ARGS)

bench-gpu: $(STAMP) ## speed, memory and utilisation of large models with random weights, on an accelerator
	$(BIN)/python bench/gpu.py $(ARGS)

growth: $(STAMP) ## how the cost of an epoch grows with tokens, steps, pictures, rank, width and depth
	$(BIN)/python bench/growth.py $(ARGS)

compare: $(STAMP) ## run every algorithm on the embedded model (hours); an interrupted comparison continues
	$(BIN)/python bench/compare.py $(ARGS)

pretrain: $(STAMP) ## train the embedded pipeline from nothing (hours); an interrupted run continues
	$(BIN)/python -m flowalign.shapes.pretrain $(ARGS)

clean: ## remove caches and build products; .venv and outputs/ stay
	rm -rf build dist .pytest_cache .ruff_cache .coverage ./*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch is named beside the package so that pip settles on its build (CPU or CUDA) by the machine's own pip settings.
# A candidate is tried by running it: version managers leave commands on the path that only print an error.
$(STAMP): pyproject.toml
	@if [ ! -x $(BIN)/python ] || [ -n "$(PYTHON)" ]; then \
		for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python); do \
			if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$python; break; fi; \
		done; \
		if [ -z "$${found:-}" ]; then \
			echo 'flowalign needs Python 3.11 or newer with its venv module, and none of these is: $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python).' >&2; \
			echo 'Install one (Debian, Ubuntu: apt install python3.11-venv), or name it: make setup PYTHON=/path/to/python3.12' >&2; \
			exit 1; \
		fi; \
		echo "making $(VENV) with $$($$found -V)"; \
		$$found -m venv $(VENV); \
	fi
	$(BIN)/python -m pip install '$(TORCH)' -e '.[dev]'
	@touch $@
