# make demo   train five recipes of a small GLM at three learning rates on real text, every layer watched: which survive, what breaks
#             first, which cure holds; judged, with a report (about 4 minutes on two idle cores)
# make test   the whole test suite (about 7 minutes on two idle cores)
# make check  formatting, lint, types
# make docs   the documentation as a site in site/, warnings are errors
#
# Each makes .venv and installs what it needs, once; a changed pyproject.toml or constraints.txt installs anew.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Reports, tests and training pin their own thread counts; pip's chatter helps nobody.
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: demo test test-slow check format docs clean

demo: $(VENV)/.demo
	$(BIN)/python -m experiments run demo
	$(BIN)/python -m experiments report demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow" tests

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow tests

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "written: site/index.html"

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here; say which with: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=23.2"
	@touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable ".[corpus,glm]"
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable ".[corpus,dask,glm,dev,distributed,hf,slurm]"
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) build site *.egg-info .mypy_cache .ruff_cache .pytest_cache
