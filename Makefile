# Two commands for a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin
# Tests in as many processes as there are cores, but no more than memory is sure to hold.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

.PHONY: quickstart test quick slow check lint bench mutants docs clean

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[audio,dev,docs,export,hub,mlflow,notebooks,robots,slurm,wandb]'
	touch $@

quickstart: .venv/.installed
	test -f runs/quickstart/metrics.json || { rm -rf runs/quickstart && \
		$(BIN)/flowkit train experiment=digits_cfm hydra.run.dir=runs/quickstart; }
	$(BIN)/flowkit evaluate run=runs/quickstart

test: quick slow

check: lint quick

quick: .venv/.installed
	$(PYTEST) -m "not slow"

slow: .venv/.installed
	$(PYTEST) -m slow

lint: .venv/.installed docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: .venv/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	@# A dependency of torchcfm that nothing here needs: built for another torch, it breaks imports.
	$(BIN)/pip uninstall --quiet --yes torchvision
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only -s

# One-line changes of the code that the tests must notice, in the functions changed since BASE. With
# `make mutants BASE=` in all functions: 8552 changes, about 75 a minute on one of 2 busy CPU cores.
BASE ?= origin/main
mutants: .venv/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[mutants]'
	OMP_NUM_THREADS=1 $(BIN)/python $(if $(BASE),tests/changed_functions.py $(BASE),-m mutmut run)
	@$(BIN)/mutmut results | grep -v 'not checked' || echo all noticed

docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo open build/site/index.html

clean:
	rm -rf .venv build dist *.egg-info
