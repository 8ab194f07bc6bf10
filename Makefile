# make demo    set up .venv, then adapt the shipped base model to summarisation and report (about 5 minutes on 2 cores)
# make test    set up .venv, then run every test that needs no GPU (about 5 minutes on 2 cores)
# make gpu     on a machine with a CUDA card, offline: build, run the tests on the card, run the benchmarks
# make lint    ruff and mypy      make bench    the benchmarks on this CPU      make base    train the shipped base model again

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test gpu lint bench base clean

demo: $(VENV)/ready
	$(BIN)/python -m fastlora demo --output demo

test: $(VENV)/test-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile tests

gpu:
	PYTHON=$(or $(PYTHON),python3) bash benchmarks/gpu.sh

lint: $(VENV)/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test-ready
	$(BIN)/python -m benchmarks --json

base: $(VENV)/ready
	$(BIN)/python -m fastlora.demo.pretrain --output fastlora/data/base

$(VENV)/ready: constraints.txt pyproject.toml setup.py $(NATIVE)
	@test -n "$(PYTHON)" || { echo "fastlora needs Python 3.11, 3.12 or 3.13: none was found (set PYTHON=...)"; exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version): a minute or two, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/test-ready: $(VENV)/ready
	@$(PIP) --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info fastlora/*.so
