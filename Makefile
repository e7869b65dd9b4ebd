# `make demo` shows the whole of it offline; `make test` is what CI runs. Both make their own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/python -m finetrainers demo

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.installed: EXTRAS :=
$(VENV)/.installed-dev: EXTRAS := [dev]

# A mark stands while pip works, so that an environment left behind by a killed install is made anew.
# torch goes first and alone: pip then takes a CPU build where one lies ready, before anything else asks for torch.
$(VENV)/.installed $(VENV)/.installed-dev: pyproject.toml constraints.txt
	@if [ -e $(VENV)/.installing ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "Creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); \
	fi
	@touch $(VENV)/.installing
	@echo "Installing finetrainers$(EXTRAS) and what it needs into $(VENV)"
	@set -e; trap 'rm -f $(VENV)/.installing' EXIT; \
		$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"; \
		$(PIP_INSTALL) --editable ".$(EXTRAS)"
	@touch $@
