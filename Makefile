# Every target sets itself up: Python >= 3.11 and make are enough.
# PYTHON=python3.12 make demo        another Python
# UV_TORCH_BACKEND=cpu make demo     another build of torch (cpu, auto, cu126, ...)

PYTHON ?= python3
READY := .venv/.ready
IN_VENV := .venv/bin/python
BUILD_PAGES := NO_MKDOCS_2_WARNING=1 $(IN_VENV) -m mkdocs build --strict

.PHONY: help setup demo test test-long test-slurm check docs tables figures verify bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{ printf "make %-10s %s\n", $$1, $$2 }'

setup: $(READY) ## create .venv with everything that the other targets need

demo: $(READY) ## dense, SFP, thin and PSAP on the handwritten digits: a table, a picture, runs/demo/report.json
	@$(IN_VENV) -m experiments.demo

test: $(READY) ## the tests, at most 10 minutes
	@OMP_NUM_THREADS=1 $(IN_VENV) -m pytest -n 2 --dist loadfile

test-long: $(READY) ## the tests that take longer
	@OMP_NUM_THREADS=1 $(IN_VENV) -m pytest -m long -n 2 --dist loadfile

test-slurm: $(READY) ## the cluster's job scripts on a private Slurm, which root on Debian or Ubuntu gets installed
	@(command -v slurmctld && command -v munged) >/dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null || \
	    { echo "error: Slurm is needed: install the packages slurm-wlm and munge" >&2; exit 2; }; \
	  echo "installing slurm-wlm and munge" && apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends slurm-wlm munge >/dev/null; }
	@$(IN_VENV) -m pytest -m slurm -n 2 tests/slurm

check: $(READY) ## format, lint, types, and the pages without warnings
	@$(IN_VENV) -m ruff format --check .
	@$(IN_VENV) -m ruff check .
	@$(IN_VENV) -m mypy
	@$(BUILD_PAGES)

docs: $(READY) ## the pages as HTML in build/docs, without warnings
	@$(BUILD_PAGES)

tables: $(READY) ## analysis/reports/tables, from the recorded results and what others published
	@$(IN_VENV) -m analysis.build tables --record

figures: $(READY) ## analysis/reports/figures, from the recorded results
	@$(IN_VENV) -m analysis.build figures --record

verify: $(READY) ## how many goals are reached, and where our cells lie beside published figures
	@$(IN_VENV) -m analysis.build verify

bench: $(READY) ## what training, pruning, files and exported networks cost: runs/bench/report.json
	@$(IN_VENV) -m experiments.benchmark

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache psap_core.egg-info build

# Prints "ok" where the suite can be installed; "old", or nothing but an error, otherwise.
PROBE = $(shell $(PYTHON) -c 'import sys; print("ok" if sys.version_info >= (3, 11) else "old")' 2>/dev/null)
PROBE_VENV = $(shell $(PYTHON) -c 'import ensurepip, venv; print("ok")' 2>/dev/null)
# The torch pins do not apply where UV_TORCH_BACKEND chooses the build.
PINS = $(if $(UV_TORCH_BACKEND),grep -vE '^(torch|torchvision)==',cat) constraints.txt

$(READY): pyproject.toml requirements.txt constraints.txt
	$(if $(filter ok,$(PROBE)),,$(error Python 3.11 or newer is needed and $(PYTHON) is not one: name yours, as in PYTHON=python3.12 make demo))
	$(if $(filter ok,$(PROBE_VENV)),,$(error $(PYTHON) lacks the venv module: install it (on Debian and Ubuntu the package python3-venv) and try again))
	@echo "setting up .venv (torch and its libraries: once, up to some gigabytes)"
	@test -x $(IN_VENV) || $(PYTHON) -m venv .venv
	@$(PINS) > .venv/constraints.txt
	@$(IN_VENV) -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt uv
	@$(IN_VENV) -m uv pip install --python $(IN_VENV) --compile-bytecode --constraint .venv/constraints.txt --requirement requirements.txt
	@touch $@
