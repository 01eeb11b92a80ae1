# NAMES chooses what `make models` makes (default: all; `python -m tools.models --list` lists them)
PYTHON ?= python3
NAMES ?=

VENV := .venv
BIN := $(VENV)/bin
# touched when the environment has what pyproject.toml and constraints.txt ask for
INSTALLED := $(VENV)/.installed
# the same, with what builds the site
INSTALLED_DOCS := $(VENV)/.installed-docs

.PHONY: demo test test-slow fetch-peer-tests peer-tests models lint docs clean

demo: $(INSTALLED)
	$(BIN)/python -m tools.models smollm2-135m-instruct text:wiki
	$(BIN)/python examples/demo.py

# a test process per core, each with one thread
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# transformers' own tests, from its source distribution, in build/peer
fetch-peer-tests: $(INSTALLED)
	$(BIN)/python -m tools.peer_tests

# these tests on lowered models, beside what is recorded (an hour), and every mode of `generate`
peer-tests: fetch-peer-tests
	$(BIN)/python -m benchmarks.peer_tests --against docs/results/data/peer-tests.json
	$(BIN)/python -m benchmarks.generation_modes

models: $(INSTALLED)
	$(BIN)/python -m tools.models $(NAMES)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# a warning, such as a link that leads nowhere, is an error; nothing is fetched
docs: $(INSTALLED_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "the site is in build/site"

# models, data and the environment stay: they take long to make
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -rf .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch comes first: everything else is resolved around the build that is installed
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,demo]'
	touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@
