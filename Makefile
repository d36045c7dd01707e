# wardlink on a fresh Debian 12 or Raspberry Pi OS: `make demo` and `make test` install what they need themselves.
#
#   make demo ARGS="--seconds 60"      make test ARGS="tests/gateway -x"      make test PYTHON=python3.13 VENV=.venv313

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
ONLY ?=

export PYTHON VENV

.PHONY: help demo test faults bench aarch64 lint lint-style lint-format lint-types lint-imports lint-cython setup setup-test clean
.DEFAULT_GOAL := help

help: ## show this
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup ## the whole chain for 30 s on private servers and virtual devices; ARGS="--help" shows more
	@$(VENV)/bin/wardlink demo $(ARGS)

test: setup-test ## the whole test suite; ARGS go to pytest
	@$(VENV)/bin/python -m pytest $(ARGS)

faults: setup-test ## the long form of the fault rigs: power cuts, failing disks, damage, hours of work
	@WARDLINK_LONG=1 $(VENV)/bin/python -m pytest -m faults $(ARGS)

bench: ## how far ahead of its peers it is, as a table and as build/bench.json; ONLY=kernels, devices, durability, losses or bridge
	@sh .ci/setup dev,bench
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(VENV)/bin/python tests/bench/run.py $(ONLY)

aarch64: setup-test ## build the kernels for aarch64 and run their tests under qemu-user; by hand, it says what it needs
	@sh tests/aarch64.sh $(ARGS)

lint: lint-style lint-format lint-types lint-imports lint-cython ## all linters; -k shows what each of them finds

lint-style: setup-test
	$(VENV)/bin/ruff check

lint-format: setup-test
	$(VENV)/bin/ruff format --check

lint-types: setup-test
	$(VENV)/bin/mypy

lint-imports: setup-test
	$(VENV)/bin/lint-imports

# It calls pycodestyle by name.
lint-cython: setup-test
	PATH="$(abspath $(VENV))/bin:$$PATH" cython-lint --max-line-length=120 ext

setup: ## what the demo needs: Debian packages, virtual environment, wardlink
	@sh .ci/setup gateway,cloud

setup-test: ## what the tests and the linters need on top
	@sh .ci/setup dev

clean: ## remove everything that these commands made in the checkout
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find gateway cloud_sync wardlink ext tests -name __pycache__ -prune -exec rm -rf {} +
	find gateway cloud_sync wardlink -name '*.so' -delete
