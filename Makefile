# Two commands on a fresh machine with python3, make and git:
#   make demo   install, then train, compare, draw, measure and report in one go
#   make test   install, then run the tests
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed

.PHONY: help demo test test-all bench lint clean

help:
	@echo "make demo      train on synthetic shapes, check and measure the kernels, write a report"
	@echo "make test      the tests (minutes); on a machine with a GPU the kernels are tested there"
	@echo "make test-all  also the slow ones: overfitting real images"
	@echo "make bench     the pytest-benchmark suite and its report, in runs/bench"
	@echo "make lint      ruff"
	@echo "make clean     remove $(VENV)"

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV). On Linux this downloads about 3 GB (PyTorch with its CUDA libraries), once."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(VENV)/bin/mrcnn-bench demo

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "not slow"

test-all: $(INSTALLED)
	$(VENV)/bin/python -m pytest

bench: $(INSTALLED)
	mkdir -p runs/bench
	$(VENV)/bin/python -m pytest bench --benchmark-only --benchmark-json=runs/bench/benchmark.json
	$(VENV)/bin/mrcnn-bench report runs/bench/benchmark.json --output runs/bench

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV)
