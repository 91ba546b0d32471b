# Everything here sets itself up: the first target that needs it makes a virtual environment in .venv,
# installs the versions in constraints.txt from the package index, and builds epcomm into it.
PYTHON ?= python3
VENV ?= .venv
# Which torch to install. Empty: the one that VENV, or else PYTHON, already has.
TORCH ?= $(shell grep '^torch==' constraints.txt)
# Tests at the same time.
JOBS ?= $(shell nproc)
# More arguments for pytest: make test PYTEST_ARGS='-k combine -x'; -n0 runs one test at a time.
PYTEST_ARGS ?=

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
CONSTRAINTS = $(VENV)/constraints.txt
SOURCES := $(shell find csrc include cmake python -type f -not -path '*/__pycache__/*') CMakeLists.txt
export PATH := $(abspath $(VENV))/bin:$(PATH)
# pip tells what it fetches the first time, and only errors when it builds an edit.
QUIET = $(if $(wildcard $(VENV)/.installed),--quiet)
# ThreadSanitizer of older compilers cannot place its shadow memory on kernels that randomise much.
FIXED_ADDRESSES := $(shell setarch -R true 2>/dev/null && echo setarch -R)
# Published engines that tests/engines runs, 300 MB in all; ENGINES= leaves these tests out.
ENGINES ?= $(patsubst tests/engines/%.txt,%,$(wildcard tests/engines/*.txt))
NOT_ENGINES = $(if $(ENGINES),,--ignore=tests/engines)
# Each worker has up to 20 processes, of several sets of ranks.
PYTEST_JOBS = -n $(JOBS) --maxprocesses 4 --dist worksteal

.PHONY: help demo test test-cpp test-python test-engines test-gpu bench engines engines-bundle lint format clean FORCE
.DELETE_ON_ERROR:

help:
	@echo 'make demo      four ranks dispatch and combine, every row checked, bandwidth printed'
	@echo 'make test      C++ tests, C++ tests under ThreadSanitizer, Python tests'
	@echo 'make test-gpu  the Python tests that need CUDA GPUs'
	@echo 'make bench     bench/all2all.py over four ranks of this machine'
	@echo 'make lint      formatting, linters, types, layering'
	@echo 'make format    reformat the sources'
	@echo 'make clean     remove .venv and build'
	@echo
	@echo 'make TORCH=torch==2.11.0 test   with another torch'
	@echo 'make TORCH= test                with the torch that $(PYTHON) has'
	@echo 'make TORCH= VENV=DIR test       in the virtual environment DIR, with its torch'
	@echo 'make EPCOMM_CUDA=OFF test       without the CUDA transports'
	@echo 'make ENGINES= test              without published engines: Megatron-Core, SGLang, torchtitan'

demo: $(VENV)/.installed
	$(VENV)/bin/python bench/demo.py

# Not a list of two: both use every core, also when make runs jobs in parallel, and the summary of
# pytest comes last.
test: test-cpp
	@$(MAKE) --no-print-directory test-python

test-cpp: $(VENV)/.build_tools
	@mkdir -p build
	cmake -S . -B build/tests -G Ninja -DEPCOMM_BUILD_PYTHON=OFF -DEPCOMM_BUILD_TESTS=ON >build/tests.log || { cat build/tests.log; exit 1; }
	@grep 'C++ tests' build/tests.log
	cmake --build build/tests
	ctest --test-dir build/tests --output-on-failure --parallel $(JOBS)
	cmake -S . -B build/tests-tsan -G Ninja -DEPCOMM_BUILD_PYTHON=OFF -DEPCOMM_BUILD_TESTS=ON -DEPCOMM_SANITIZE=thread >build/tests-tsan.log || { cat build/tests-tsan.log; exit 1; }
	@grep 'C++ tests' build/tests-tsan.log
	cmake --build build/tests-tsan
	$(FIXED_ADDRESSES) ctest --test-dir build/tests-tsan --output-on-failure --parallel $(JOBS)

test-python: $(VENV)/.installed engines
	$(VENV)/bin/python -m pytest -q -m 'not gpu' $(PYTEST_JOBS) $(NOT_ENGINES) $(PYTEST_ARGS)

# Part of test-python.
test-engines: $(VENV)/.installed engines
	$(VENV)/bin/python -m pytest -q -m 'not gpu' tests/engines $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed engines
	$(VENV)/bin/python -m pytest -q -m gpu $(NOT_ENGINES) $(PYTEST_ARGS)

bench: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc-per-node 4 bench/all2all.py

lint: $(VENV)/.lint_tools
	tools/lint.sh

format: $(VENV)/.lint_tools
	tools/lint.sh --fix

clean:
	rm -rf .venv build

# ---- the environment ----
# Each file below is the mark that one step is done.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "epcomm needs Python 3.10 or newer; choose one with PYTHON=")'
	$(PYTHON) -m venv $(if $(TORCH),,--system-site-packages) $(VENV)

# constraints.txt with the torch that was asked for; rewritten only when that changes.
$(CONSTRAINTS): FORCE | $(VENV)/bin/python
	@{ grep -v '^torch==' constraints.txt; echo '$(TORCH)'; } >$@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(VENV)/.build_tools: $(CONSTRAINTS)
	$(PIP) install -c $(CONSTRAINTS) scikit-build-core pybind11 cmake ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.build_tools pyproject.toml $(SOURCES)
	$(PIP) install $(QUIET) --no-build-isolation -c $(CONSTRAINTS) '.[test,bench]'
	@$(VENV)/bin/python -c 'import epcomm; epcomm.show_config()'
	@touch $@

engines: $(ENGINES:%=$(VENV)/engines/.%)

# The engines in one file of 50 MB, for a machine with the same Python and no package index:
# scripts/gpu.sh engines. For another Python: make PYTHON=python3.12 VENV=build/venv-3.12 engines-bundle
engines-bundle: engines
	@mkdir -p build
	XZ_OPT=-T0 tar -C $(VENV)/engines --exclude=__pycache__ -cJf build/engines.tar.xz.new $(ENGINES)
	@mv build/engines.tar.xz.new build/engines.tar.xz
	@ls -l build/engines.tar.xz

# Newer than the Python that may run it: tests/engines/megatron-core-0.19.2.txt says why that works.
$(VENV)/engines/.megatron-core-0.19.2: ENGINE_OPTIONS = --only-binary=:all: --ignore-requires-python \
	--python-version 3.12 --implementation cp --abi cp312 --platform manylinux_2_28_$(shell uname -m)

# Python alone, for 3.11 and newer; with 3.10 its tests are skipped.
$(VENV)/engines/.torchtitan: ENGINE_OPTIONS = --ignore-requires-python

# As published, each in a folder of its own, which only the ranks of tests/engines look into.
$(VENV)/engines/.%: tests/engines/%.txt | $(VENV)/bin/python
	@mkdir -p $(VENV)/engines && rm -rf $(VENV)/engines/$*
	$(PIP) install --quiet --no-deps --no-compile --target $(VENV)/engines/$* $(ENGINE_OPTIONS) -r $<
	@touch $@

$(VENV)/.lint_tools: pyproject.toml | $(VENV)/.installed
	$(PIP) install $(QUIET) --no-build-isolation -c $(CONSTRAINTS) '.[lint]'
	@touch $@
