# Every target sets up .venv by itself. Needed: Python 3.11 or newer (PYTHON=... names another one) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Arguments for `make serve` and the test targets, for example: make test-unit ARGS="-k tokenizer"
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DEFAULT_GOAL := help
.PHONY: help demo demo-hosts serve test test-unit test-hosts check check-format check-lint check-types check-floors check-stubs check-contract \
        fuzz overload chaos soak growth peers bench-router bench-hosts bench-kernels format stubs wheel hooks clean venv

help: ## list the targets
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)$$/\1|\2/p' Makefile | while IFS='|' read -r t d; do printf '  %-14s %s\n' "$$t" "$$d"; done

demo: $(READY) ## four ranks, several prompts, text as it streams; ends by itself
	$(BIN)/caravan demo

serve: $(READY) ## a server in the foreground, until Ctrl-C (ARGS="--model DIR --ranks 2")
	$(BIN)/caravan serve $(ARGS)

test: $(READY) ## all tests that need no GPU
	$(BIN)/python -m pytest tests/unit -n 2 --dist worksteal -m "not gpu" --durations=10 $(ARGS)
	$(BIN)/python -m pytest tests/distributed tests/e2e -m "not gpu and not hosts" --durations=15 $(ARGS)

test-hosts: $(READY) ## starts over four hosts: ten in a row, and eight faults that each name their host (root, 10 minutes)
	$(BIN)/python -m pytest tests/distributed tests/e2e -m hosts --durations=15 $(ARGS)

demo-hosts: $(READY) ## four hosts as network namespaces, eight ranks, a prompt, a line a host (root)
	$(BIN)/python -m tests.hosts.demo $(ARGS)

test-unit: $(READY) ## only tests/unit: no Ray, no network, under a minute
	$(BIN)/python -m pytest tests/unit -n 2 --dist worksteal -m "not gpu" --durations=15 $(ARGS)

fuzz: $(READY) ## 10,000 random requests on both doors of a router (ARGS="--requests 50000")
	$(BIN)/python -m tests.fuzz $(ARGS)

overload: $(READY) ## five times more requests than a real server can take
	$(BIN)/python -m tests.overload $(ARGS)

chaos: $(READY) ## 1,000 streams while ranks, routers and the leader are killed; a table and a picture (ARGS="--seed 2")
	$(BIN)/python -m tests.chaos $(ARGS)

soak: $(READY) ## a real server under 16 streams for 20 minutes: nothing grows, nothing is lost (ARGS="--minutes 5")
	$(BIN)/python -m tests.soak $(ARGS)

growth: $(READY) ## how cost grows with streams, prompts, experts and ranks; a picture (ARGS="--out FOLDER")
	$(BIN)/python -m tests.growth $(ARGS)

peers: $(READY) ## Caravan beside vLLM, in alternation (ARGS="--vllm VENV --checkpoint DIR")
	$(BIN)/python -m tests.peers $(ARGS)

bench-router: $(READY) ## messages a second through a router, beside a bare gRPC server
	$(BIN)/python -m tests.bench_router $(ARGS)

bench-hosts: $(READY) ## step time against exchanges a step and delay between hosts (root; ten minutes)
	$(BIN)/python -m tests.hosts.bench_delay $(ARGS)

bench-kernels: $(READY) ## the CPU kernels beside what this machine's memory and cores give
	$(BIN)/python -m tests.bench_kernels

check: check-format check-lint check-types check-floors check-stubs check-contract ## everything CI checks before the tests

check-format: $(READY) ## ruff: is the code formatted
	$(BIN)/ruff format --check

check-lint: $(READY) ## ruff: likely mistakes
	$(BIN)/ruff check

check-types: $(READY) ## mypy, strict, on all source
	$(BIN)/mypy

check-floors: $(READY) ## import-linter: imports point down
	$(BIN)/lint-imports --no-cache

check-stubs: $(READY) ## are the committed gRPC stubs those of the .proto files
	$(BIN)/python protos/generate.py --check

check-contract: $(READY) ## does caravan.v1 only add to the last release's
	$(BIN)/python -m protos.breaking

format: $(READY) ## format the code and mend what ruff can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

stubs: $(READY) ## regenerate the gRPC stubs
	$(BIN)/python protos/generate.py

wheel: $(READY) ## build the wheel into dist/
	rm -rf build
	$(BIN)/python -m build --no-isolation --wheel
	rm -rf build

hooks: $(READY) ## run the checks before every commit
	$(BIN)/pre-commit install

clean: ## remove what builds, checks and tests leave (.venv stays)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(wildcard cluster dashboards protos router tests workers) -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(READY) ## only set up .venv

# The stamp is written last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "Caravan needs Python 3.11 or newer, and there is no '$(PYTHON)' here; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Caravan needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -c 'import platform; print(platform.python_version())'); name a newer one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments (no venv or ensurepip); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV) (once, and after a change of pyproject.toml or constraints.txt; a few minutes, mostly torch)"
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) -m venv --clear $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install -c constraints.txt pip setuptools
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $(READY)
	@echo "$(VENV) is ready"
