# make help lists the targets. Every target sets up what it needs: a virtual environment in $(VENV), the compiled module.

PYTHON ?= python3
VENV ?= .venv
BUILD ?= build/dev
# What pip is told to install as torch. Where the package index serves a CUDA build and the CPU one is wanted:
#   make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

# Builds of torch for a CPU come without Triton; the GPU kernels are compiled and interpreted with this one then.
TRITON ?= "triton==3.6.0; sys_platform == 'linux' and platform_machine == 'x86_64'"

# Processes that share the tests.
WORKERS ?= 2

FUZZ_SECONDS ?= 600
MKDOCS ?= build

BIN := $(VENV)/bin
# Bytecode is made of a file when it is first needed, not of every one.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
CPP = $(shell find csrc tests/native tests/emulated edgecolbert_kernels/backends/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.DEFAULT_GOAL := help
# pip fetches a target's requirements while the module is compiled.
MAKEFLAGS += --jobs=2
# Ninja would take the slots of this make for its own, through descriptors that it does not inherit.
unexport MAKEFLAGS
.PHONY: help demo test train bench bench-quick docs lint format module objects fuzz spills emulate sanitize matrix wheels \
    contribute clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(BIN)/.demo module  ## train on the standard library's docstrings, then search (DEMO="--no-train", or "--data DIR" for a BEIR folder)
	$(BIN)/python -m demo $(DEMO)

test: $(BIN)/.test module  ## all tests (PYTEST="-k masks" to choose)
	$(BIN)/python -m pytest tests -n $(WORKERS) $(PYTEST)

train: $(BIN)/.train module  ## one stage of training (CONFIG=training/configs/NAME.toml, SET="key=value ...")
	$(BIN)/python -m training.train $(CONFIG) $(SET)

bench: $(BIN)/.bench module  ## all benchmarks and the numbers to reach (BENCH="--pylate PYTHON" for PyLate's as well)
	$(BIN)/python -m benchmarks.all $(BENCH)

bench-quick: $(BIN)/.bench module  ## the main benchmarks, briefly; leaves the committed results alone
	$(BIN)/python -m benchmarks.all --quick $(BENCH)

docs: $(BIN)/.docs  ## the pages in build/site, every link checked (MKDOCS=serve to watch them)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(MKDOCS) --strict

lint: $(BIN)/.lint  ## ruff, clang-format and mypy; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(BIN)/.lint  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

module: $(BUILD)/build.ninja  ## the compiled module, in place; only what changed is compiled
	$(BIN)/cmake --build $(BUILD) --target _C
	$(BIN)/cmake --install $(BUILD) --prefix edgecolbert_kernels

$(BUILD)/build.ninja: $(BIN)/.base
	$(BIN)/cmake --fresh -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)

objects: $(BIN)/.base  ## the objects of the instruction sets alone, in build/native
	$(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DEDGECOLBERT_PYTHON=OFF -DEDGECOLBERT_NATIVE_TESTS=ON
	$(BIN)/cmake --build build/native --target isa_objects

fuzz: $(BIN)/.test  ## damaged folders of packed embeddings against their reader, under AddressSanitizer (FUZZ_SECONDS=60; 600 by default)
	PATH="$(abspath $(BIN)):$$PATH" tools/sanitize.sh --fuzz $(FUZZ_SECONDS)

spills: objects  ## register spills in the hot loops of those objects
	$(BIN)/python tools/spills.py $$(awk '$$1 != "scalar" { print $$2 }' build/native/isa_objects.txt)

emulate: $(BIN)/.base  ## the kernels on other CPUs, under qemu
	PATH="$(abspath $(BIN)):$$PATH" tools/emulate.sh

sanitize: $(BIN)/.test  ## the tests under AddressSanitizer and UndefinedBehaviorSanitizer
	PATH="$(abspath $(BIN)):$$PATH" tools/sanitize.sh $(PYTEST)

matrix:  ## installs with every Python and compiler of this machine (slow)
	tools/build_matrix.sh

wheels:  ## the release in dist/: an sdist and a manylinux wheel for each Python of this machine
	tools/wheels.sh

contribute:  ## times a contributor's first steps: a fresh clone to green tests, and to a first benchmark
	tools/contribute.sh

clean:  ## removes what was built; the virtual environment stays
	rm -rf build *.egg-info edgecolbert_kernels/_C.*.so

# EDGECOLBERT_BUILD=0: the module comes from `make module`, which compiles only what changed.
$(BIN)/.base: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("needs Python 3.10 or later: make PYTHON=python3.12")'
	@echo "== $(VENV): environment with torch, numpy and the build tools"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) $(TORCH)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP_INSTALL) $(TRITON)
	$(PIP_INSTALL) "setuptools>=77" cmake ninja pybind11
	EDGECOLBERT_BUILD=0 $(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

$(BIN)/.demo $(BIN)/.test $(BIN)/.train $(BIN)/.bench $(BIN)/.lint $(BIN)/.docs: $(BIN)/.%: $(BIN)/.base
	@echo "== $(VENV): requirements of make $*"
	EDGECOLBERT_BUILD=0 $(PIP_INSTALL) --no-build-isolation --editable ".[$*]"
	@touch $@
