# make demo   train five recipes of a small GLM at three learning rates on real text, every layer watched: which survive, what breaks
#             first, which cure holds; judged, with a report (about 4 minutes on two idle cores)
# make test   the whole test suite (about 7 minutes on two idle cores)
# make check  formatting, lint, types
# make docs   the documentation as a site in site/, warnings are errors
# make test-oldest, make test-newest
#             the suite with the oldest torch that pyproject.toml allows, and with the newest of everything, on Python 3.13; each in an
#             environment of its own, of some 7 GB where torch brings CUDA
#
# Each makes .venv and installs what it needs, once; a changed pyproject.toml or constraints.txt installs anew.

PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.13
OLDEST_TORCH := torch==2.9.1
VENV := .venv
DEV := .[corpus,dask,glm,dev,distributed,hf,slurm]
BIN := $(VENV)/bin
# Reports, tests and training pin their own thread counts; pip's chatter, and setuptools' about editable installs, help nobody.
PIP := PYTHONWARNINGS=ignore::UserWarning $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: demo test test-slow test-oldest test-newest check format docs clean

demo: $(VENV)/.demo
	$(BIN)/python -m experiments run demo --report

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow" tests

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow tests

# A newer library's deprecations are news, not failures.
test-oldest: $(VENV)-oldest/.dev
	$(VENV)-oldest/bin/python -m pytest -n 2 -m "not slow" -W default tests

test-newest: $(VENV)-newest/.dev
	$(VENV)-newest/bin/python -m pytest -n 2 -m "not slow" -W default tests

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "written: site/index.html (its search needs a server: $(PYTHON) -m http.server --directory site)"

$(VENV)/.made:
	@$(PYTHON) -c pass 2>/dev/null || { echo "error: no $(PYTHON) here; say which with: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=23.2"
	@touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable ".[corpus,glm]"
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable "$(DEV)"
	@touch $@ $(VENV)/.demo

# The tested set but for torch and what hangs on its release.
$(VENV)-oldest/.dev: pyproject.toml constraints.txt
	@$(PYTHON) -c pass 2>/dev/null || { echo "error: no $(PYTHON) here; say which with: make test-oldest PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)-oldest
	grep -viE '^(torch|torchao|torchmetrics|triton|setuptools)==' constraints.txt > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip --quiet install --constraint $(VENV)-oldest/constraints.txt "$(OLDEST_TORCH)" --editable "$(DEV)"
	@touch $@

$(VENV)-newest/.dev: pyproject.toml
	@$(NEWEST_PYTHON) -c pass 2>/dev/null || { echo "error: no $(NEWEST_PYTHON) here; say which with: make test-newest NEWEST_PYTHON=/path/to/python"; exit 2; }
	$(NEWEST_PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip --quiet install --upgrade --editable "$(DEV)"
	@touch $@

$(VENV)/.docs: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build site *.egg-info .mypy_cache .ruff_cache .pytest_cache
