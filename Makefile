# Every target builds the same .venv first. Needs Python >= 3.11, git, make.
PYTHON ?= python3
# cpu | cu128 | auto ...: which build of torch to install; empty = what your package index serves.
TORCH_BACKEND ?=
# uv does not read pip's configuration: hand over the extra places that pip was told to look in.
export UV_FIND_LINKS ?= $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
export PHOTON_BIN := .venv/bin/photon
# Containers and CI often set it: then every process compiles torch and all else that it imports again, seconds each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-sites test-all check format bench docs clean help
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "photon needs Python >= 3.11, this is %s: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet uv
	.venv/bin/uv pip install --quiet --python .venv/bin/python $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND)) -e '.[dev]'
	@touch $@

demo: .venv/.ready  ## four owners of text train one model on this machine, offline, in about 4 minutes
	.venv/bin/photon train

test: .venv/.ready  ## the fast test suite (no network, no GPU)
	.venv/bin/python -m pytest -n 2 --dist loadfile

test-sites: .venv/.ready  ## federations of real processes: kill -9, cut links, liars, strangers (half an hour)
	.venv/bin/python -m pytest -m "sites and not slow"

test-all: .venv/.ready  ## fast and slow tests, one after the other
	.venv/bin/python -m pytest -n 2 --dist loadfile -m "not gpu and not sites"
	.venv/bin/python -m pytest -m sites

check: .venv/.ready  ## lint, format, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/.ready  ## apply the formatter and the safe lint fixes
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/.ready  ## the quick benchmarks, in under 10 minutes on a quiet machine
	.venv/bin/python -m benchmarks.all

docs: .venv/.ready  ## write the pages that are generated from the code
	.venv/bin/python -m photon.docgen > docs/configuration.md
	.venv/bin/python -m photon.schema_doc > docs/metrics.md

clean:  ## remove the environment and caches (not runs/ and data/)
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
