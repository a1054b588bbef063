# The commands of this project; `make help` lists them. Everything is installed in .venv.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# The first supported Python; `make PYTHON=...` chooses another.
PYTHON ?= $(firstword $(foreach name,python3 python3.11 python3.12 python3.13 python3.10,$(shell \
	$(name) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && echo $(name))))
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The folder of `make cluster`; its sockets need a short path.
CLUSTER ?= /tmp/hpc-rlhf-cluster
# Tests to run, such as `make test TESTS="tests/spec -k position"`.
TESTS ?=
# Whose Slurm `make test-slurm` tries: this system's, and that of other Debian releases.
RELEASES ?= host trixie forky
# Two workers take groups of tests in the order in which they are collected.
PARALLEL := --numprocesses 2 --dist loadgroup --no-loadscope-reorder
# The tests of `make test-fast`.
FAST := "not slurm and not train and not slow and not gpu and not vllm"
# Length of the benchmark: full or short.
BENCH ?= full
# Bytes of text that bench-tokens tokenizes.
SIZE ?= 2e9
# Number of faults in a storm, its seed, and whose Slurm it strikes: this system's, or that of a Debian release.
FAULTS ?= 200
SEED ?= 1
RELEASE ?=

.PHONY: help install install-vllm demo demo-grpo docs test test-fast test-slurm test-vllm coverage fuzz models bench bench-learning bench-tokens loop chaos ettr plan-check gpu-check gpu-wheels lint cluster cluster-down clean

help:  ## List these commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

install: .venv/.installed-dev  ## Install the package and the development tools in .venv

# Two stamps: the demo needs no development tools.
.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 found; set one with make PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing dependencies in .venv; the first time takes several minutes" >&2
	$(PIP) --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[dev,search,serve,trackers]'
	@touch $@

# The newest TRL, and 1.12, the last with PPO, in a folder of its own.
.venv/.installed-bench: .venv/.installed-dev
	$(PIP) --editable '.[bench]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/trl-ppo trl==1.12.0
	@touch $@

install-vllm: .venv/.installed  ## Install vLLM, for rollout.engine, in .venv-vllm; takes several minutes
	scripts/install-vllm.sh

demo: .venv/.installed  ## Train a tiny chat model on this machine, in a new folder in runs/
	$(BIN)/hpc-rlhf run jobs/tiny.yaml --set run_dir=runs/demo-$$(date +%Y%m%d-%H%M%S)

demo-grpo: .venv/.installed  ## Train a tiny model on rewards that can be verified: the results of arithmetic
	$(BIN)/hpc-rlhf run jobs/tiny-grpo.yaml --set run_dir=runs/demo-grpo-$$(date +%Y%m%d-%H%M%S)

docs: .venv/.installed  ## Regenerate docs/spec.md and docs/commands.md
	$(BIN)/python docs/generate.py

test: .venv/.installed-dev  ## Run all tests, on two versions of Slurm where possible
	scripts/install-slurm.sh
	scripts/install-chromium.sh
	scripts/install-apptainer.sh
	scripts/newer-slurm.sh trixie true
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) -m "not vllm" $(TESTS)
	$(if $(TESTS),,OMP_NUM_THREADS=1 scripts/newer-slurm.sh trixie $(BIN)/pytest -m generations tests/cluster)

test-slurm: .venv/.installed-dev  ## Run the tests of Slurm on its versions 22.05, 24.11 and 26.05
	scripts/install-slurm.sh
	@for release in $(RELEASES); do echo "On Slurm of $$release:"; enter="scripts/newer-slurm.sh $$release"; \
	    [[ $$release != host ]] || enter=; \
	    OMP_NUM_THREADS=1 $$enter $(BIN)/pytest -m "slurm and not vllm" $(TESTS) || failed=1; done; exit $${failed:-0}

test-fast: .venv/.installed-dev  ## Run the tests that need no Slurm, no training and no waiting
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) -m $(FAST) $(TESTS)

test-vllm: .venv/.installed-dev install-vllm  ## Run all tests of vLLM; make test runs a few where it is installed
	scripts/install-slurm.sh
	OMP_NUM_THREADS=1 HPC_RLHF_REQUIRE_VLLM=1 $(BIN)/pytest -k vllm $(TESTS)

coverage: .venv/.installed-dev  ## Measure the coverage of test-fast and enforce its floor
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) -m $(FAST) --cov --cov-report term $(TESTS)

fuzz: .venv/.installed-dev  ## Try 10,000 mutated specs, 1,000 hostile specs, 10,000 mutated data files and 1,000 hostile answers
	HPC_RLHF_FUZZ=1 $(BIN)/pytest tests/spec/test_mutations.py tests/launch/test_hostile.py \
		tests/train/data/test_fuzz.py tests/train/rewards/test_math.py

models: .venv/.installed-dev  ## Try a tiny model of every family, and rewrite docs/models.md; takes an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.models.table

bench: .venv/.installed-bench  ## Measure speed and memory against peers; BENCH=short is quicker
	BENCH=$(BENCH) $(BIN)/python -m tests.benchmarks

bench-learning: .venv/.installed-bench  ## Compare learning with peers; takes over an hour
	$(BIN)/python -m tests.benchmarks.learning --work runs/learning

bench-tokens: .venv/.installed-dev  ## Tokenize SIZE bytes of generated text under kills; 2e9 take an hour or two
	$(BIN)/python -m tests.benchmarks.tokenizing --work runs/tokens --size $(SIZE)

loop: .venv/.installed-dev  ## Train the demo, vote on it, and train the next round, in a new folder in runs/
	$(BIN)/python -m tests.loop runs/loop-$$(date +%Y%m%d-%H%M%S)

chaos: .venv/.installed-dev install-vllm  ## Run chains with PPO, GRPO, 3D parallelism and vLLM under FAULTS random faults; 200 take four hours
	scripts/install-slurm.sh
	$(if $(RELEASE),scripts/newer-slurm.sh $(RELEASE)) $(BIN)/python -m tests.storm --faults $(FAULTS) --seed $(SEED)
	$(if $(RELEASE),scripts/newer-slurm.sh $(RELEASE)) $(BIN)/python -m tests.storm --faults $(FAULTS) --seed $(SEED) --grpo
	$(BIN)/python -m tests.storm --faults $$(($(FAULTS) / 5)) --seed $(SEED) --3d
	$(BIN)/python -m tests.storm.resize
	$(BIN)/python -m tests.storm --faults $$(($(FAULTS) / 5)) --seed $(SEED) --vllm
	$(BIN)/python -m tests.storm --faults $$(($(FAULTS) / 5)) --seed $(SEED) --here

ettr: .venv/.installed-dev  ## Measure the ETTR of a chain preempted every two minutes; takes half an hour
	scripts/install-slurm.sh
	$(BIN)/python -m tests.storm.ettr

plan-check: .venv/.installed-dev  ## Compare the estimates of plan and auto with measurements; takes ten minutes
	$(BIN)/python -m tests.benchmarks.plan_peaks
	$(BIN)/python -m tests.benchmarks.auto_search

gpu-check:  ## Check a machine with a GPU in under 8 minutes; needs no network
	scripts/gpu-check.sh

gpu-wheels: .venv/.installed-dev  ## Collect the packages that gpu-check may lack on that machine
	scripts/gpu-wheels.sh

lint: .venv/.installed-dev  ## Check style, types, import layers and shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/conftest.py tests/cluster tests/gpu
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run scripts/*.sh tests/golden/*/*.sbatch

cluster: .venv/.installed-dev  ## Start a four-node Slurm cluster on this machine
	scripts/install-slurm.sh
	@$(BIN)/python -m tests.cluster up $(CLUSTER)

cluster-down:  ## Stop that cluster and remove it
	$(BIN)/python -m tests.cluster down $(CLUSTER)

clean:  ## Remove .venv, .venv-vllm and caches, but not runs/
	rm -rf .venv .venv-vllm .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage build dist gpu-check gpu-wheels
	find hpc_rlhf tests -name __pycache__ -prune -exec rm -rf {} +
