# make repro           set up, check the parameters, run the pipeline
# make students JOBS=2 the same, with so many students and baselines trained at once
# make test            set up, run the tests
# make lint            set up, check format and style

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY := .venv/.ready
JOBS ?= 2

.PHONY: setup repro students test lint

setup: $(READY)

# Bytecode is compiled here, once: where Python may not write it, every stage would compile again.
# What is installed has the hashes of these two lock files, or nothing is installed.
# DVC unpickles what its site cache holds, and would keep it where every user may write.
$(READY): Makefile requirements.lock requirements-uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) --version) found; Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --disable-pip-version-check --require-hashes \
	  --requirement requirements-uv.lock
	uv pip install --quiet --python .venv/bin/python --compile-bytecode --require-hashes \
	  --requirement requirements.lock
	@mkdir -p -m 700 .venv/dvc .venv/dvc/repo
	@case "$$(dvc config core.site_cache_dir)" in ''|*/.venv/dvc) \
	  dvc config --local core.site_cache_dir "$$PWD/.venv/dvc";; esac
	@touch $@

repro: $(READY)
	@python -m pipeline.commands.repair_dvc
	python -m pipeline.commands.check
	dvc repro
	@python -m pipeline.stages.compare --show

students: $(READY)
	@python -m pipeline.commands.repair_dvc
	python -m pipeline.commands.check
	python -m pipeline.commands.train_students --jobs '$(JOBS)'
	@python -m pipeline.stages.compare --show

# Files in the order of their names: xdist would begin with those of many tests, and end with one
# worker waiting for the longest, which are few.
test: $(READY)
	python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(READY)
	ruff format --check .
	ruff check .
