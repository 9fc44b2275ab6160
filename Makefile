# On a fresh machine, nothing before them:  make demo   and   make test
# Both make .venv once and reuse it until pyproject.toml or constraints.txt changes.

PYTHON ?= python3
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help demo test versions range lint format

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*##/make \1 -/p' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## Decode held-out prompts with the shipped model: plain, unpadded, and with each drafter
	$(BIN)/python examples/01_demo.py

test: $(INSTALLED)  ## Run every test (JOBS=2 processes)
	$(BIN)/pytest --numprocesses $(JOBS) --dist worksteal --durations 10

# What is not named in WITH is taken from .venv.
VERSIONED := .venv-versions
QUICK := tests/test_hf.py
TRANSFORMERS := 5.0.0 5.24.0
versions: $(INSTALLED)  ## Run quick tests with other versions, as in WITH="transformers==5.24.0"
	@$(BIN)/python -m venv --clear --without-pip $(VERSIONED)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(VERSIONED)/lib/python3*/site-packages)/base.pth
	@$(BIN)/pip --python $(VERSIONED)/bin/python install -qq --no-compile $(WITH)
	$(VERSIONED)/bin/python -m pytest --quiet -p no:cacheprovider $(QUICK)

range: $(TRANSFORMERS:%=range-%)  ## Run quick tests with the oldest and the newest transformers that are supported
range-%: $(INSTALLED)
	@$(MAKE) versions WITH=transformers==$* VERSIONED=$(VERSIONED)-$*

lint: $(INSTALLED)  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The constraints hold torch at the tested version; without them pip would take whatever is newest.
# Compiling all that is installed takes longer than installing it; Python compiles what is imported.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3 ...")'
	@echo "Installing into $(VENV) (the first time takes minutes: torch is large)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@
