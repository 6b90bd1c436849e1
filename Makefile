# make demo | make test | make test-serve | make lint | make bench | make wheels | make help
#
# Everything is installed into $(VENV), which is created where it does not exist. Variables:
#   USE_ACTIVE=1      install into the environment that $(PYTHON) belongs to instead
#   PYTHON=python3    the Python (3.10 or newer) that makes the environment, or is the environment's own
#   VENV=.venv        the environment's folder
#   TORCH=...         the torch to install (default torch==2.13.0); empty: keep the one that is there
#   TORCH_INDEX=URL   package index to take torch from, for example one with builds for CPU alone
# and those of the build, which setup.py describes: BBK_BUILD_CUDA, BBK_CUDA_ARCHS, CUDACXX, MAX_JOBS.

PYTHON ?= python3
VENV ?= .venv
USE_ACTIVE ?= 0
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

# Pythons that make cuda-wheels builds for; those that are not installed are passed over.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13

DEMO = -m blockbatch compare --model tiny
BENCH = bench/run.py

ifeq ($(USE_ACTIVE),1)
ENV_PYTHON := $(PYTHON)
ENV_DIR := $(shell $(PYTHON) -c 'import sys; print(sys.prefix)')
else
ENV_PYTHON := $(VENV)/bin/python
ENV_DIR := $(VENV)
endif

# One stamp for each set of extras, in the environment, holding the checkout that is installed there.
STAMPS := $(ENV_DIR)/.blockbatch-run $(ENV_DIR)/.blockbatch-dev $(ENV_DIR)/.blockbatch-bench
INSTALLED_FROM := $(sort $(shell cat $(STAMPS) 2>/dev/null))
BUILD_INPUTS := setup.py pyproject.toml CMakeLists.txt blockbatch_kernels/__init__.py $(wildcard csrc/*/*)

.DEFAULT_GOAL := help
.PHONY: help demo test test-serve lint bench wheels cuda-wheels check-wheel install install-dev check-python clean other-checkout
.DELETE_ON_ERROR:

help:
	@echo "make demo         install, then decode sample prompts with the built-in model by every method"
	@echo "make test         install with the tools of development, then run the tests"
	@echo "make test-serve   install, then the tests of the server with the long ones, schemathesis, lm_eval, routers and Dynamo"
	@echo "make lint         ruff and clang-format, which change nothing"
	@echo "make bench        install with what the benchmarks need, then run them"
	@echo "make wheels       a source archive and a wheel without the CUDA extension, in dist/"
	@echo "make cuda-wheels  a wheel with the extension for each of: $(PYTHONS); minutes each"
	@echo "make check-wheel  install the wheel of make wheels into a bare environment, and run the demo there"
	@echo "make install      install only;  make install-dev: with the tools of development"
	@echo "make clean        remove builds and caches;  $(VENV) stays"
	@echo "Installs go to $(VENV); USE_ACTIVE=1 takes the active environment. The Makefile's head names all variables."

demo: $(ENV_DIR)/.blockbatch-run
	$(ENV_PYTHON) $(DEMO)

test: $(ENV_DIR)/.blockbatch-dev
	$(ENV_PYTHON) -m pytest -n auto --maxprocesses 8 --dist loadgroup tests

test-serve: $(ENV_DIR)/.blockbatch-dev
	$(ENV_PYTHON) -m pip install -q schemathesis 'lm_eval[api]>=0.4.13' smg vllm-router uvloop httptools locust
	-$(ENV_PYTHON) -m pip install -q ai-dynamo-runtime msgspec pyzmq && $(ENV_PYTHON) -m pip install -q --no-deps ai-dynamo
	BLOCKBATCH_LONG_TESTS=1 $(ENV_PYTHON) -m pytest tests/test_serving_*.py

lint: $(ENV_DIR)/.blockbatch-dev
	$(ENV_PYTHON) -m ruff check .
	$(ENV_PYTHON) -m ruff format --check .
	$(ENV_DIR)/bin/clang-format --dry-run -Werror csrc/*/*

bench: $(ENV_DIR)/.blockbatch-bench
	$(ENV_PYTHON) $(BENCH)

# The wheel is built from the source archive, which so is known to hold all that a build needs.
wheels: $(ENV_DIR)/.blockbatch-dev
	rm -rf dist build
	BBK_BUILD_CUDA=0 $(ENV_PYTHON) -m build

cuda-wheels:
	@for python in $(PYTHONS); do \
	  if $$python -c '' 2>/dev/null; then \
	    BBK_BUILD_CUDA=1 $$python -m pip wheel --no-deps --wheel-dir dist . || exit 1; \
	  else echo "$$python: not here, passed over"; fi; \
	done

check-wheel: wheels
	@set -e; wheel=$$(ls $(CURDIR)/dist/*-none-any.whl); folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PYTHON) -m venv "$$folder/venv"; cd "$$folder"; unset PYTHONPATH; \
	venv/bin/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(or $(TORCH),torch); \
	venv/bin/python -m pip install -q "$$wheel"; \
	venv/bin/blockbatch compare --model tiny

install: $(ENV_DIR)/.blockbatch-run
install-dev: $(ENV_DIR)/.blockbatch-dev

$(ENV_DIR)/.blockbatch-run: EXTRAS =
$(ENV_DIR)/.blockbatch-dev: EXTRAS = [dev]
$(ENV_DIR)/.blockbatch-bench: EXTRAS = [bench]

$(STAMPS): $(BUILD_INPUTS) | check-python
ifneq ($(USE_ACTIVE),1)
	@test -x $(ENV_PYTHON) || { echo "Creating the environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
endif
	@echo "Installing into $(ENV_DIR):"
	@echo "  $(or $(TORCH),torch as it is there)$(if $(TORCH_INDEX), from $(TORCH_INDEX))"
	@echo "  blockbatch (editable)$(if $(EXTRAS), with the extra $(EXTRAS)), numpy, safetensors, tokenizers, huggingface_hub"
	@echo "  the CUDA extension: BBK_BUILD_CUDA=$${BBK_BUILD_CUDA:-auto}, nvcc: $$(command -v nvcc || echo none);"
	@echo "  it is compiled where there are both nvcc and a GPU, or with BBK_BUILD_CUDA=1, and takes some minutes"
	$(if $(TORCH),$(ENV_PYTHON) -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH))
	$(ENV_PYTHON) -m pip install $$(sh -c ': >/dev/tty' 2>/dev/null && echo -q || echo -v) -e '.$(EXTRAS)'
	@$(ENV_PYTHON) -c "from blockbatch_kernels import cuda; print('CUDA backend:', cuda.why_unavailable() or 'available')"
	@echo $(CURDIR) | tee $@ > $(ENV_DIR)/.blockbatch-run

# An environment that another checkout was installed into since is installed into again.
ifneq ($(filter-out $(CURDIR),$(INSTALLED_FROM)),)
$(STAMPS): other-checkout
endif

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); name another with PYTHON=..."; \
	  exit 1; }

clean:
	rm -rf build dist *.egg-info python/*.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f blockbatch_kernels/_C*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
