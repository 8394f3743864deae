# make demo, make test, make lint: each sets up what is missing first.
#   MMDIST_STACK=openmmlab|onedl|cls  the original distributions, the forks, or
#                                  MMPretrain alone (classification)
#   PYTHON=python3.12              the Python of a new environment
#   QUICK=1                        a two-minute demo
#   JOBS=4                        models that make zoo checks at a time
#   TESTS=tests/test_setup.py ARGS='-m "not slow"'   passed on to pytest
MMDIST_STACK ?= openmmlab
VENV ?= .venv$(if $(filter-out openmmlab,$(MMDIST_STACK)),-$(MMDIST_STACK))
PY := $(VENV)/bin/python
# hides the GPU where mmcv has no operators for it
GPU := . '$(VENV)/gpu.env' &&
LINT := $(wildcard mmdist tools tests configs benchmarks setup.py docs)

.PHONY: help setup demo test lint docs zoo format clean distclean

help:
	@echo 'make demo    set up if needed, then train and compare on digit scenes (QUICK=1: 2 minutes)'
	@echo 'make test    set up if needed, then run the tests (TESTS=... ARGS=...)'
	@echo 'make lint    flake8, isort and yapf (make format applies the last two)'
	@echo 'make docs    build the documentation as a site, in build/site'
	@echo 'make zoo     check every family of the zoos in an environment of its own (ARGS=--resume to go on)'
	@echo 'make setup   set up only (PYTHON=python3.12, MMDIST_STACK=onedl)'
	@echo 'make clean   remove caches; make distclean: the environments too'

setup:
	@sh tools/setup/install.sh '$(VENV)' '$(MMDIST_STACK)' '$(PYTHON)'

demo: setup
	$(GPU) $(PY) tools/demo.py $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

# one thread a process: on few cores more threads only wait for each other
test: export OMP_NUM_THREADS ?= 1
test: export MKL_NUM_THREADS ?= 1
# what runs without detectors and segmentors
test: TESTS ?= $(if $(filter cls,$(MMDIST_STACK)),tests/test_classification tests/test_models/test_losses)
test: setup
	$(GPU) $(PY) -m pytest $(TESTS) $(ARGS)

# every family of the zoos, in an environment with what some models need
zoo: ZOO := work_dirs/zoo-$(MMDIST_STACK)
zoo: VENV := $(VENV)-zoo
zoo: PY = $(VENV)/bin/python
zoo: export OMP_NUM_THREADS ?= 1
zoo: export HF_HUB_OFFLINE := 1
zoo: setup
	$(PY) -m pip install -q -c requirements/constraints.txt -r requirements/zoo-$(MMDIST_STACK).txt
	mkdir -p $(ZOO)
	$(PY) tools/analysis_tools/check_zoo.py --jobs $(or $(JOBS),1) --json $(ZOO)/zoo.json --markdown $(ZOO)/zoo.md $(ARGS)

lint: setup
	$(PY) -m flake8 $(LINT)
	$(PY) -m isort --check-only --diff $(LINT)
	$(PY) -m yapf --diff --recursive --parallel $(LINT)

# needs no model, so an environment of its own; warnings are errors
docs: VENV := .venv-docs
docs:
	$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(or $(PYTHON),python3) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install -q -c requirements/constraints.txt -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

format: setup
	$(PY) -m isort $(LINT)
	$(PY) -m yapf --in-place --recursive --parallel $(LINT)

clean:
	rm -rf build dist .pytest_cache
	find mmdist tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-* .cache mmdist/.mim *.egg-info
