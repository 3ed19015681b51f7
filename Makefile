# Everything a contributor needs; each command sets up what it uses, once.
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
UV := $(BIN)/uv
SBOM := dist/sbom.cdx.json

.DEFAULT_GOAL := help
.PHONY: help run test again coverage quick live faults cancellation soak contract simulate fuzz mutation check lint types imports format bench bench-check growth audit sbom alerts clean

help: ## show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# The environment is rebuilt when the lock changes, and never otherwise: the second run needs no network.
.venv/.ready: pyproject.toml uv.lock .ci/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is required; try: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement .ci/uv.txt
	@VIRTUAL_ENV= $(BIN)/uv sync --quiet --frozen --inexact --all-extras --python $(BIN)/python
	@touch $@

run: .venv/.ready ## start the demo: PostgreSQL, Valkey, sample data, the API and a page (PORT=8000)
	@exec $(BIN)/goodstanding demo --port $(PORT)

test: .venv/.ready ## run every test against a real PostgreSQL and Valkey
	@$(BIN)/python -m pytest

again: .venv/.ready ## run the tests that failed last
	@$(BIN)/python -m pytest --last-failed --last-failed-no-failures none

coverage: .venv/.ready ## the same, and tell which lines no test runs (takes half as long again)
	@rm -f .coverage .coverage.*
	@$(BIN)/python -m coverage run -m pytest
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report

quick: .venv/.ready ## run the tests that take seconds
	@$(BIN)/python -m pytest -q -m "not slow"

live: .venv/.ready ## put a fleet under writes and every fault, outages of 30 s among them (ten minutes)
	@GOODSTANDING_LIVE=whole $(BIN)/python -m pytest -rP tests/test_live.py

faults: .venv/.ready ## break every server in every way, under load, and print what held (ten minutes)
	@$(BIN)/python -m tests.faults --report docs/reference/faults.md

cancellation: .venv/.ready ## send requests of which a third vanish, and look for what they left (REQUESTS=1000000)
	@$(BIN)/python -m tests.faults.cancellation --requests $(or $(REQUESTS),1000000) --report docs/reference/cancellation.md

soak: .venv/.ready ## an hour of load, and a fault every minute (MINUTES=60)
	@$(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),60) --report docs/reference/soak.md

contract: .venv/.ready ## let schemathesis try the whole OpenAPI document, from a random seed (EXAMPLES=200)
	@GOODSTANDING_EXAMPLES=$(or $(EXAMPLES),200) $(BIN)/python -m pytest tests/test_openapi.py

simulate: .venv/.ready ## simulate the fleet under every fault on virtual time, from random seeds (SEEDS=1000)
	@$(BIN)/python -m tests.simulation --seeds $(or $(SEEDS),1000)

# The fuzzer is a big wheel, and there is none for every machine.
.venv/.fuzz: .venv/.ready
	@VIRTUAL_ENV= $(BIN)/uv sync --quiet --frozen --inexact --all-extras --group fuzz --python $(BIN)/python
	@touch $@

fuzz: .venv/.fuzz ## let a fuzzer look for bytes that break a parser (SECONDS=60; Linux on x86-64)
	@$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60)

.venv/.mutation: .venv/.ready
	@VIRTUAL_ENV= $(BIN)/uv sync --quiet --frozen --inexact --all-extras --group mutation --python $(BIN)/python
	@touch $@

# Without ONLY all of it, anew; with it, these changes again, the others as they were.
mutation: .venv/.mutation ## change four modules in every small way, and tell which changes no test notices; below nine in ten it fails (ONLY='goodstanding.auth*')
	@test -n "$(ONLY)" || rm -rf mutants
	@$(BIN)/python -m tests.mutation --max-children $(or $(CHILDREN),2) $(if $(ONLY),'$(ONLY)')

check: lint types imports ## everything that reads the code without running it

lint: .venv/.ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: .venv/.ready
	@$(BIN)/mypy

imports: .venv/.ready
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

format: .venv/.ready ## mend what can be mended by itself
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

# What benchmarks compare with is installed for them alone.
.venv/.bench: .venv/.ready
	@VIRTUAL_ENV= $(BIN)/uv sync --quiet --frozen --inexact --all-extras --group bench --python $(BIN)/python
	@touch $@

bench: .venv/.bench ## measure the documented figures, as ratios in one run (Node.js, if there, for one comparison)
	@$(BIN)/python -m benchmarks

bench-check: .venv/.bench ## measure the ratios of reads again and fail where they are worse than recorded
	@$(BIN)/python -m benchmarks --check --name reads --only hot cold batch token

# An audit that nobody can be asked for is told, and is no reason to fail; where CI is set it is one, for nobody reads it.
# uv ends with 1 for what it finds, and with 2 for an error: only then do these lines speak of a request that was not
# answered, and not of an advisory that names one.
audit: .venv/.ready ## ask for known vulnerabilities of what is locked (needs the network)
	@told=$$($(UV) audit --frozen --preview-features audit-command 2>&1); code=$$?; echo "$$told"; \
	if [ $$code -eq 2 ] && echo "$$told" | grep -qE '^(error|  cause): error sending request for url \('; then \
		echo "not audited: the vulnerability database cannot be reached"; test -n "$$CI" || exit 0; \
	fi; exit $$code

sbom: .venv/.ready ## write what a user installs, as CycloneDX (SBOM=dist/sbom.cdx.json)
	@mkdir -p $(dir $(SBOM))
	@$(UV) export --quiet --frozen --no-dev --format cyclonedx1.5 --preview-features sbom-export --output-file $(SBOM) >/dev/null

growth: .venv/.bench ## measure how costs grow with sessions, users and processes, and draw it (a quarter of an hour)
	@$(BIN)/python -m benchmarks.growth

alerts: ## check the Prometheus rules and their tests (needs promtool)
	@command -v promtool >/dev/null || { echo "promtool is missing; on Debian: apt-get install prometheus"; exit 1; }
	@promtool check rules deploy/prometheus/alerts.yml
	@promtool test rules deploy/prometheus/alerts_test.yml

clean: ## remove the environment and every cache
	rm -rf .venv .fuzz mutants .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.* dist
