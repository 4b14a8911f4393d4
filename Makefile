# make setup           install everything in .venv
# make repro           set up, check the parameters, run the pipeline, JOBS=N stages at once
# make plan            say what `make repro` would run, and why; run nothing
# make clean-outputs   delete the results of students that params.yaml no longer defines
# make test            set up, run the tests
# make lint            set up, check format and style
# make help            print these lines

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY := .venv/.ready

.PHONY: setup repro plan clean-outputs test lint help

setup: $(READY)

# Compile bytecode once: where Python may not write it later, every stage would compile again.
# Install only files whose hashes are in these two lock files.
# DVC unpickles its site cache, and by default keeps it where every user may write: move it.
$(READY): Makefile requirements.lock requirements-uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) --version) found; Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Set-up downloads 3.2 GB and fills 6.5 GB of disk, as measured on Linux. This takes minutes."
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --disable-pip-version-check --require-hashes \
	  --requirement requirements-uv.lock
	uv pip install --python .venv/bin/python --compile-bytecode --require-hashes \
	  --requirement requirements.lock
	@mkdir -p -m 700 .venv/dvc .venv/dvc/repo
	@case "$$(dvc config core.site_cache_dir)" in ''|*/.venv/dvc) \
	  dvc config --local core.site_cache_dir "$$PWD/.venv/dvc";; esac
	@touch $@

repro: $(READY)
	@python -m pipeline.commands.repair_dvc
	python -m pipeline.commands.check
	python -m pipeline.commands.repro $(if $(JOBS),--jobs '$(JOBS)')

plan: $(READY)
	@python -m pipeline.commands.plan

clean-outputs: $(READY)
	@python -m pipeline.commands.remove_results --remove

# Run files in the order of their names. By default xdist starts with files of many tests, and at the
# end one worker is left with the few longest.
test: $(READY)
	python -m pytest -n auto --dist loadfile --no-loadscope-reorder

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

lint: $(READY)
	ruff format --check .
	ruff check .
