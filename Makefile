# make demo and make test are all that a fresh machine needs: Debian or Ubuntu with python3 (3.10 to 3.12), python3-venv, make, g++.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Exact, because a bare `torch` brings gigabytes of CUDA. For the CPU build, give pip the index that has it (PIP_EXTRA_INDEX_URL).
TORCH := torch==2.13.0
# Much of the time a test waits for processes: three at once suit two cores.
PYTEST := $(BIN)/pytest -n 3 --dist loadfile

.PHONY: help demo test lint test-long test-vm deb test-guesses bench conformance fuzz test-sanitizers clean

help: ## Say what there is to make
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/base.stamp ## Convert the demo model, with and without its LoRA, and let both answer
	$(BIN)/rkedge demo

test: lint ## Lint, type check and test
	$(PYTEST)

test-long: $(VENV)/dev.stamp ## The tests that take longer than make test may
	$(BIN)/pytest -n 2 -m long

test-vm: $(VENV)/dev.stamp ## A board's life on Debian for arm64 in qemu, as root; says how long each step takes (long)
	$(BIN)/pytest -m vm -v --durations=0 --durations-min=1 tests/vm

deb: $(VENV)/base.stamp ## Build the Debian package for boards (needs debhelper)
	$(BIN)/python -m rkboard.debian

lint: $(VENV)/dev.stamp ## ruff, mypy --strict and the rule of who may import whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/dev.stamp ## Measure speed and memory in turns with others, write docs/benchmarks.md; fails on a missed aim
	$(BIN)/python -m tests.bench

# VENDOR, RKLLAMA: checkouts. LLM_DEMO: RELEASE=PROGRAM, one or more: the vendor's demo, built after its own instructions.
conformance: $(VENV)/dev.stamp ## Ask programs of others the demo questions (VENDOR=, RKLLAMA=, LLM_DEMO=)
	$(BIN)/python -m tests.conformance $(if $(VENDOR),--vendor "$(VENDOR)") $(if $(RKLLAMA),--rkllama "$(RKLLAMA)") $(foreach demo,$(LLM_DEMO),--llm-demo "$(demo)")

fuzz: $(VENV)/dev.stamp ## Feed the emulator's readers of files with damaged ones (INPUTS=500000 each; needs clang++)
	$(BIN)/python -m tests.emulator.fuzz $(INPUTS)

test-guesses: $(VENV)/dev.stamp ## The runtime's tests with each guess of the emulator turned round (long)
	$(BIN)/python -m tests.runtime.guesses

test-sanitizers: $(VENV)/dev.stamp ## The emulator's tests with address, undefined and thread sanitizers (long)
	$(BIN)/python -m tests.emulator.sanitizers

clean: ## Remove what was built here
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/pip.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "RKEdge needs Python 3.10 or later: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/base.stamp: $(VENV)/pip.stamp pyproject.toml
	@echo "Installing RKEdge into $(VENV); this takes about half a minute."
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/pip.stamp pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/base.stamp
