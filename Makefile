# The only task runner. Every target sets up what it needs in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py CMakeLists.txt $(wildcard cpp_ext/*/*.cpp cpp_ext/include/pe_infer/*.h)
CPP := $(wildcard cpp_ext/*/*.cpp cpp_ext/*/*.cu cpp_ext/include/pe_infer/*.h)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-cpp test-dist test-export test-tensorrt test-node soak lint format schemas \
  gpu-tables bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/made:
	$(PYTHON) -m venv $(VENV)
	touch $@

# The package, editable; built again when the C++ core or the metadata changed.
$(VENV)/installed: $(VENV)/made pyproject.toml $(NATIVE)
	$(PIP) --editable .
	touch $@

$(VENV)/test: $(VENV)/installed
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/export: $(VENV)/test
	$(PIP) $(TORCH)
	$(PIP) --editable '.[test,export]'
	touch $@

$(VENV)/tensorrt: $(VENV)/test
	$(PIP) --editable '.[test,tensorrt-rtx]'
	touch $@

$(VENV)/lint: $(VENV)/test
	$(PIP) --editable '.[test,lint]'
	touch $@

demo: $(VENV)/installed  ## make a phantom study, stream it, print the verdict
	$(BIN)/pe-infer demo

test: test-cpp $(VENV)/test  ## everything that needs no GPU, no PyTorch, no TensorRT and no peers
	$(BIN)/python -m pytest --ignore=tests/export --ignore=tests/tensorrt --ignore=tests/node

test-cpp: $(VENV)/made  ## the C++ core under AddressSanitizer and UndefinedBehaviorSanitizer
	mkdir -p build
	test -x $(BIN)/cmake || $(PIP) cmake ninja
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DCMAKE_BUILD_TYPE=Debug -DPE_INFER_PYTHON=OFF -DPE_INFER_TESTS=ON -DPE_INFER_SANITIZE=ON \
	  -DPE_INFER_WERROR=ON > build/sanitize.log 2>&1 || { cat build/sanitize.log; exit 1; }
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

test-dist: $(VENV)/test  ## wheel from the sdist, installed into an empty environment
	mkdir -p build
	$(PIP) build
	rm -rf build/dist build/dist-venv
	$(BIN)/python -m build --outdir build/dist . > build/dist.log 2>&1 || { tail -50 build/dist.log; exit 1; }
	$(PYTHON) -m venv build/dist-venv
	build/dist-venv/bin/python -m pip install --quiet --disable-pip-version-check build/dist/*.whl
	cd build && dist-venv/bin/pe-infer --version && dist-venv/bin/pe-infer bundles list
	cd build && for bundle in $(notdir $(patsubst %/bundle.json,%,$(wildcard pe_infer/bundles/*/bundle.json))); \
	  do dist-venv/bin/pe-infer bundles verify $$bundle || exit 1; done

test-export: $(VENV)/export $(VENV)/lint  ## what needs PyTorch: models, export parity, training
	$(BIN)/mypy --package export
	$(BIN)/python -m pytest tests/export

test-tensorrt: $(VENV)/tensorrt  ## real TensorRT for RTX engines, CUDA kernels compiled (proprietary licences; no GPU)
	$(BIN)/python -m pytest tests/tensorrt

test-node: $(VENV)/test  ## the DICOM node with real peers: DCMTK, Orthanc
	$(BIN)/python -m pytest --timeout=900 tests/node

soak: $(VENV)/test  ## the node under load, killed 20 times; SOAK_MINUTES=10
	PYTHONPATH=tests $(BIN)/python tests/node/soak.py

lint: $(VENV)/lint  ## ruff, mypy, clang-format
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/lint  ## apply ruff and clang-format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

schemas: $(VENV)/installed  ## write docs/*.schema.json
	$(BIN)/python -m pe_infer.schemas docs

gpu-tables: $(VENV)/test  ## write the tables of docs/gpu.md (computed from the shipped graphs)
	$(BIN)/python -m benchmarks.roofline --write

bench: $(VENV)/installed  ## latency on this machine: a study for every shipped bundle
	$(BIN)/python benchmarks/latency.py

clean:  ## remove everything that was built
	rm -rf $(VENV) build dist *.egg-info pe_infer/_native.*.so
