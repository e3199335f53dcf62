# Makes its own environment in .venv; `make help` lists what there is.

PYTHON ?= python3
OUT ?= unetq-demo

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Of 20,000 modules most are never imported; Python compiles those that are, when they are, and keeps them.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(PIP) install --no-compile --editable
SOURCES := monai_unetq tests $(wildcard benchmarks)

.DEFAULT_GOAL := help
.PHONY: help demo test lint style clean
.DELETE_ON_ERROR:

help:
	@echo "make demo [DATA=DIR] [OUT=DIR]  train, quantize and measure a small U-Net; report in OUT ($(OUT))"
	@echo "                                DATA holds image/ and label/; without it, a generated phantom"
	@echo "make test                       lint, type check and all tests"
	@echo "make lint                       lint and type check only"
	@echo "make clean                      remove caches and build outputs (not $(VENV), not results)"
	@echo ""
	@echo "The first demo or test makes $(VENV) with PYTHON ($(PYTHON)) and installs into it: minutes, and about 6 GB."

demo: $(VENV)/.installed-report
	@$(BIN)/unetq demo $(if $(DATA),--data "$(DATA)") --out "$(OUT)"

# Files in their order: sorted by their number of tests, the few long ones would come last, on one process. A process that
# dies ends the run: replaced by another, it can leave pytest-xdist waiting for ever.
# mypy takes a minute on one core: it runs beside them, and its report comes before pytest's summary.
test: style
	@$(BIN)/mypy $(SOURCES) & types=$$!; \
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0; tests=$$?; \
	wait $$types && exit $$tests

lint: style
	@$(BIN)/mypy $(SOURCES)

style: $(VENV)/.installed-test
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)

clean:
	rm -rf build dist monai_unetq.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, found " + sys.version.split()[0] + ": make PYTHON=/path/to/python3")'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Stamps: installed again when the metadata change. The test environment holds the demo's.
$(VENV)/.installed-report: setup.cfg pyproject.toml | $(BIN)/python
	@echo "installing monai-unetq[report] into $(VENV); torch makes this take minutes the first time"
	@$(INSTALL) '.[report]'
	@touch $@

$(VENV)/.installed-test: setup.cfg pyproject.toml | $(BIN)/python
	@echo "installing monai-unetq[report,test] into $(VENV); torch makes this take minutes the first time"
	@$(INSTALL) '.[report,test]'
	@touch $@ $(VENV)/.installed-report
