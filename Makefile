# The commands of this project; `make help` lists them. Everything is installed into .venv.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# The first Python that the project supports; choose another by `make PYTHON=...`.
PYTHON ?= $(firstword $(foreach name,python3 python3.11 python3.12 python3.13 python3.10,$(shell \
	$(name) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && echo $(name))))
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# Where `make cluster` puts a Slurm cluster; its sockets need a short path.
CLUSTER ?= /tmp/hpc-rlhf-cluster
# Tests to run, such as `make test TESTS="tests/spec -k position"`.
TESTS ?=
# How long to measure: full, or short.
BENCH ?= full
# How many faults a storm has, and the seeds of the storms.
FAULTS ?= 200
SEED ?= 1

.PHONY: help install demo docs test fuzz bench bench-learning chaos ettr plan-check lint cluster cluster-down clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

install: .venv/.installed-dev  ## Install into .venv, with what development needs

# Two stamps: the demo needs no development tools.
.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 found; name one by make PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing what is needed into .venv; the first time this takes minutes" >&2
	$(PIP) --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[dev,serve,trackers]'
	@touch $@

# TRL's newest, and beside it 1.12, the last with a PPO: a package cannot be installed in two versions.
.venv/.installed-bench: .venv/.installed-dev
	$(PIP) --editable '.[bench]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/trl-ppo trl==1.12.0
	@touch $@

demo: .venv/.installed  ## Make a tiny chat model on this machine, in a new folder under runs/
	$(BIN)/hpc-rlhf run jobs/tiny.yaml --set run_dir=runs/demo-$$(date +%Y%m%d-%H%M%S)

docs: .venv/.installed  ## Write the pages of docs/ that are made of the code: fields and commands
	$(BIN)/python docs/generate.py

test: .venv/.installed-dev  ## Run all tests, on a real Slurm where one can be started
	scripts/install-slurm.sh
	scripts/install-chromium.sh
	scripts/install-apptainer.sh
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadgroup $(TESTS)

fuzz: .venv/.installed-dev  ## Break 10,000 specs at random, and try to break out by more than 1,000
	HPC_RLHF_FUZZ=1 $(BIN)/pytest tests/spec/test_mutations.py tests/launch/test_hostile.py

bench: .venv/.installed-bench  ## Time ours and its peers on this machine; BENCH=short takes less long
	BENCH=$(BENCH) $(BIN)/python -m tests.benchmarks

bench-learning: .venv/.installed-bench  ## See what ours and its peers learn on HH data; takes an hour
	$(BIN)/python -m tests.benchmarks.learning --work runs/learning

chaos: .venv/.installed-dev  ## Run a chain through a storm of FAULTS faults for each SEED; 200 take an hour
	scripts/install-slurm.sh
	$(BIN)/python -m tests.storm --faults $(FAULTS) --seed $(SEED)
	$(BIN)/python -m tests.storm --faults $$(($(FAULTS) / 5)) --seed $(SEED) --here

ettr: .venv/.installed-dev  ## See what preemptions every two minutes leave of a chain's time; takes half an hour
	scripts/install-slurm.sh
	$(BIN)/python -m tests.storm.ettr

plan-check: .venv/.installed-dev  ## Hold what plan tells and auto chooses against measurements; takes ten minutes
	$(BIN)/python -m tests.benchmarks.plan_peaks
	$(BIN)/python -m tests.benchmarks.auto_search

lint: .venv/.installed-dev  ## Check style, types, layers and shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/conftest.py tests/cluster
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run scripts/*.sh tests/golden/*/*.sbatch

cluster: .venv/.installed-dev  ## Start a Slurm cluster of four nodes on this machine; says how to use it
	scripts/install-slurm.sh
	@$(BIN)/python -m tests.cluster up $(CLUSTER)

cluster-down:  ## Stop that cluster and remove all of it
	$(BIN)/python -m tests.cluster down $(CLUSTER)

clean:  ## Remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find hpc_rlhf tests -name __pycache__ -prune -exec rm -rf {} +
