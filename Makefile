# make demo, make test: set up the environment, build, run. Repeatable; the active virtual environment is used when
# there is one, else .venv here; its torch is used when it has one.
SHELL := /bin/bash
TORCH ?= torch==2.13.0
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),$(CURDIR)/.venv)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
BUILD := build/dev

.PHONY: demo test vision zoo bench develop tools install env cuda-compile gpu report-cuda test-cuda \
  bench-cuda aarch64-compile format clean help

help:
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/  --/'

env: ## the environment: a virtual environment with torch
	@if [ ! -x $(PY) ]; then \
	  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "fastnn needs Python 3.10 or newer; python3 is $$(python3 --version 2>&1)" >&2; exit 1; }; \
	  echo "-- making a virtual environment in $(VENV)"; python3 -m venv $(VENV); fi
	@if $(PY) -c "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"; then \
	  $(PY) -c "$$CHECK_TORCH" $(VENV); \
	else echo "-- installing $(TORCH) in $(VENV)"; $(PIP) install numpy $(TORCH); fi

# Stops before pip could replace an older torch by another one.
define CHECK_TORCH
import sys
from importlib.metadata import version
torch, venv = version("torch"), sys.argv[1]
if tuple(map(int, torch.split("+")[0].split(".")[:2])) < (2, 11):
    sys.exit(f"fastnn needs torch 2.11 or newer and {venv} has {torch}: type `{venv}/bin/pip install --upgrade torch`")
print("-- using torch", torch, "of", venv)
endef
export CHECK_TORCH

install: env ## fastnn built and installed in the environment, with what the demo and the tests need
	@echo "-- building and installing fastnn (minutes the first time)"
	@$(PIP) install '.[test]'

demo: install ## trains the MNIST CNN with torch.nn and with fastnn side by side
	@mkdir -p out
	@echo "-- python -m fastnn train"
	@cd out && $(PY) -m fastnn train --png train.png --json train.json
	@echo "-- train.png and train.json are in out/"

test: install vision ## all tests, by two processes that take file after file
	@echo "-- pytest"
	@$(PY) -m pytest -p no:cacheprovider -n 2 --dist loadfile tests

# Without their dependencies, of which pip would take another torch; the rest of them are in the test extra.
vision: env # the torchvision that belongs to the torch in the environment, and timm: models for the tests
	@$(PY) -c "$$CHECK_VISION" || $(PIP) install --no-deps $$($(PY) -c "$$CHECK_VISION")

define CHECK_VISION
from importlib.metadata import PackageNotFoundError, version
wanted = {"timm": "1.0.31", "torchvision": f"0.{int(version('torch').split('.')[1]) + 15}"}
def missing(name):
    try:
        return not version(name).startswith(wanted[name])
    except PackageNotFoundError:
        return True
absent = [f"{name}=={wanted[name]}.*" for name in wanted if missing(name)]
if absent:
    print(*absent)
    raise SystemExit(1)
endef
export CHECK_VISION

zoo: install vision ## every torchvision classification model and many of timm, converted and compared with torch.nn
	@cd tests && $(PY) -m zoo

bench: install ## the pytest-benchmark suites
	@$(PY) -m pytest -p no:cacheprovider benches

tools: env
	@$(PY) -c "import pybind11" 2>/dev/null || $(PIP) install scikit-build-core pybind11 ninja cmake pytest pytest-xdist pytest-benchmark hypothesis expecttest rich matplotlib scikit-learn onnx onnxscript

CONFIGURE = PATH=$(VENV)/bin:$$PATH cmake -S . -G Ninja -DPython_EXECUTABLE=$(PY) \
  -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir)

develop: tools ## an in-place build for working on fastnn: `PYTHONPATH=python python ...`
	@$(CONFIGURE) -B $(BUILD) -DFASTNN_WITH_CUDA=$${FASTNN_WITH_CUDA:-off} > /dev/null
	@PATH=$(VENV)/bin:$$PATH cmake --build $(BUILD)
	@cmake --install $(BUILD) --prefix python > /dev/null

cuda-compile: tools ## CUDA kernels (sm_80, sm_90; warnings are errors) and the ops that call them, compiled; needs no GPU
	@$(CONFIGURE) -B build/cuda -DFASTNN_WITH_CUDA=compile-only > /dev/null
	@PATH=$(VENV)/bin:$$PATH cmake --build build/cuda --target check_cuda

gpu: tools # an in-place build with CUDA kernels for the device that is present
	@$(MAKE) develop FASTNN_WITH_CUDA=on BUILD=build/gpu

# What wants a device, within MINUTES with the build: one file, out/cuda.json, complete after every step.
MINUTES ?= 9
CUDA_REPORT = end=$$(($$(date +%s) + 60 * $(MINUTES))); mkdir -p out; $(MAKE) gpu && \
  PYTHONPATH=python $(PY) benches/cuda_report.py --out out/cuda.json --until $$end

report-cuda: ## on a machine with a GPU: test-cuda and bench-cuda within MINUTES (9) in all; writes out/cuda.json
	@$(CUDA_REPORT)

test-cuda: ## on a machine with a GPU: the tests on the device, then compute-sanitizer on a few of them
	@$(CUDA_REPORT) --steps tests,sanitizers

bench-cuda: ## on a machine with a GPU: fastnn against torch, op by op, and both sides of every choice
	@$(CUDA_REPORT) --steps sweep,choices

AARCH64_CXX ?= aarch64-linux-gnu-g++
aarch64-compile: ## the CPU kernels compiled for aarch64 by a cross compiler
	@for file in csrc/kernels/cpu/*.cpp csrc/kernels/cpu/isa/*.cpp; do \
	  $(AARCH64_CXX) -std=gnu++20 -O2 -fno-rtti -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -DFASTNN_ISA_NS=isa_baseline \
	    '-DFASTNN_ISA_NAME="baseline"' -c -o /dev/null $$file || exit 1; \
	  echo "-- $$file"; done

format: ## clang-format and ruff, as .pre-commit-config.yaml runs them
	@$(PY) -m pre_commit --version > /dev/null 2>&1 || $(PIP) install pre-commit
	@$(PY) -m pre_commit run --all-files

clean: ## removes what the build made; the environment stays
	rm -rf build out
