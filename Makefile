# Two commands for a fresh machine: `make demo` and `make test`. Both set themselves up.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A process a core, each with one thread; tests of threads set how many they want.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: setup demo test test-long lint clean

setup: $(READY)

# The kernels are compiled by the installation: whoever pulls other sources gets them anew.
$(READY): pyproject.toml setup.py $(wildcard swatfx/kernels/csrc/*.[ch] swatfx/kernels/csrc/bf16/*.c)
	$(PYTHON) -c 'import sys; sys.exit("swatfx wants Python 3.11 or newer, set PYTHON=") if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/swatfx demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST)

test-long: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,zoo]'
	$(PYTEST) -m 'slow or not slow'

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
