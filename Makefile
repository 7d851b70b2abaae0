# One word a job. Everything runs inside .venv, which `make setup` builds from the lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What `make crash` runs: the tiers that need nothing but this machine and strace, as far as they are there.
TIERS ?= $(foreach tier,model kill seam,$(if $(wildcard tests/crash/$(tier).py),$(tier)))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-postgres chaos attacks crash crash-all mutants fuzz api-fuzz audit check format lock clean

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## build .venv from the lock (first run only)

$(READY): requirements.lock pyproject.toml scripts/setup
	@scripts/setup $(PYTHON) $(VENV)
	@touch $@

demo: $(READY) ## a real fleet updates itself: make demo [ARGS='--exit --agents 20']
	@$(BIN)/python -m compileall -q agent_core updater keys release_server
	@$(BIN)/relfleet demo $(ARGS)

# Long stories with many real processes, and suites with a command of their own; `make test-long` runs them.
LONG := tests/attacks tests/conformance tests/integration tests/release_server/api/test_contract.py \
	$(patsubst %,tests/release_server/test_%.py,alerts editions_race nginx retention serve session shares_race \
	signin_served slow_clients tls webhooks webhooks_served)

test: $(READY) ## the tests but for the long ones: make test [ARGS='tests/updater -k resume']
	@$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),-n 2 --dist loadfile $(LONG:%=--ignore=%))

test-long: $(READY) ## attacks, TUF conformance, and the longest stories
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(LONG)

test-postgres: $(READY) ## the server's tests on a private PostgreSQL, started from the installed programs
	@RELFLEET_TEST_DATABASE=postgres $(BIN)/python -m pytest $(or $(ARGS),-n 2 --dist loadfile \
		tests/release_server tests/integration/test_rollouts.py tests/integration/test_outages.py)

chaos: $(READY) ## replicas and their PostgreSQL killed under 300 simulated agents: make chaos [ARGS='--kills 50']
	@$(BIN)/python -m tests.chaos $(ARGS)

attacks: $(READY) ## what a thief and a hostile network try, and what is refused (part of make test-long)
	@$(BIN)/python -m tests.attacks $(ARGS)

crash: $(READY) ## power cuts and kills at every step: make crash [TIERS=model]
	@scripts/need strace:strace
	@$(BIN)/python -m tests.crash $(TIERS)

crash-all: $(READY) ## every tier of the crash proof; some need root
	@scripts/crash-setup
	@RELFLEET_CRASH=all $(BIN)/python -m tests.crash all

fuzz: $(READY) ## readers of foreign bytes, by coverage: make fuzz [ARGS='60 index settings']
	@scripts/fuzz $(or $(ARGS),15)

api-fuzz: $(READY) ## many generated requests to each route of the API, as every role: make api-fuzz [ARGS=25]
	@RELFLEET_API_FUZZ=$(or $(ARGS),25) $(BIN)/python -m pytest -q tests/release_server/api/test_contract.py

audit: ## known holes in what the lock names; needs the network and an advisory service
	@scripts/audit $(PYTHON) $(ARGS)

mutants: $(READY) ## faults put in on purpose, each of which the crash proof must catch
	@$(BIN)/python -m tests.crash.mutants

check: $(READY) ## lint, format, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: $(READY) ## put the code into its form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: ## renew requirements.lock: every dependency's version and hashes
	@scripts/lock $(PYTHON)

clean: ## remove what the other targets made
	@rm -rf $(VENV) dist build relfleet-demo .relfleet-demo.before .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
