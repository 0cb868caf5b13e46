# medseg: `make demo` and `make test` need only make and Python 3.11 or newer; they set up .venv on first use.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
PYTEST := $(BIN)/python -m pytest
INPUTS := pyproject.toml constraints.txt

# The first one that is new enough; name another with `make PYTHON=/path/to/python test`.
# Python 3.11 goes first: constraints.txt holds the versions tested with it.
CANDIDATES := python3.11 python3.12 python3.13 python3 python
ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach name,$(CANDIDATES),$(shell $(name) -c '$(ENOUGH)' 2>/dev/null && echo $(name))))

.DEFAULT_GOAL := help
.PHONY: help demo test test-system soak lint docs bench clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(BIN)/.run ## the whole journey on synthetic patients (about four minutes), into medseg-demo/
	@$(BIN)/medseg demo --out medseg-demo

test: $(BIN)/.test ## the test suite; skips what needs real data (../shared/data or MEDSEG_DATA) where it is absent
	@$(PYTEST) -n auto --maxprocesses=4 --dist=loadfile -m "not soak and not system" $(ARGS)

test-system: $(BIN)/.test ## tests against real servers and validators, which it installs; a skip is a failure
	@scripts/install_counterparts.sh $(BIN)/python
	@PATH="$(abspath $(BIN)):$$PATH" $(PYTEST) -m system --no-skips $(ARGS)

soak: $(BIN)/.test ## the long campaigns that `make test` runs in reduced form
	@$(PYTEST) -m soak $(ARGS)

lint: $(BIN)/.test ## ruff, mypy --strict, import contracts, spelling
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/codespell

docs: $(BIN)/.docs ## the documentation, into docs/_build/html
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

bench: $(if $(NAME),$(BIN)/.run) ## list the benchmarks; `make bench NAME=x ARGS="..."` runs benchmarks/x.py
ifdef NAME
	@$(BIN)/python benchmarks/$(NAME).py $(ARGS)
else
	@echo 'make bench NAME=x ARGS="..." runs one of:'
	@for file in benchmarks/[!_]*.py; do \
	  [ -e "$$file" ] || continue; \
	  printf '  %-28s %s\n' "$$(basename "$$file" .py)" "$$(sed -n '1s/^"""\([^"]*\).*/\1/p' "$$file")"; \
	done
endif

clean: ## remove .venv, caches and built docs (never data or runs)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache docs/_build build medseg.egg-info
	find $(wildcard medseg pipelines tests scripts benchmarks docs) -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: each stands for an installed set, and is older than its inputs when it must be installed again.
$(BIN)/.run: $(INPUTS) | $(BIN)/pip
	@echo "installing medseg into $(VENV) (some minutes the first time)"
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(BIN)/.test: $(INPUTS) | $(BIN)/pip
	@echo "installing medseg and its test tools into $(VENV) (some minutes the first time)"
	@$(PIP) -c constraints.txt -e ".[test]"
	@touch $@ $(BIN)/.run

$(BIN)/.docs: $(INPUTS) | $(BIN)/pip
	@$(PIP) -c constraints.txt -e ".[docs]"
	@touch $@ $(BIN)/.run

# pip is the last thing that venv makes, so a half-made environment is made again.
$(BIN)/pip:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "No Python 3.11 or newer with venv was found (looked for: $(CANDIDATES))." >&2; \
	  echo "Install it (Debian, Ubuntu: apt install python3 python3-venv) or name one: make PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi
	@$(PYTHON) -c '$(ENOUGH)' || { echo "$(PYTHON) is missing, older than 3.11 or without venv and ensurepip." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
