# make train: set up and run the main job. make test: set up and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
GPU = runs/gpu
CSRC = $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu)

.PHONY: setup dev build train test gpu gpu-tests gpu-bench gpu-train bench-compare lint format wheel-check ci clean

setup: $(VENV)/ready
dev: $(VENV)/dev-ready

$(VENV)/ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -U 'setuptools>=77' ninja 'torch>=2.11'
	$(BIN)/python -m pip install -v --no-build-isolation -e '.[digits]'
	touch $@

$(VENV)/dev-ready: $(VENV)/ready
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]'
	touch $@

build: dev
	$(BIN)/python setup.py build_ext --inplace

train: setup
	$(BIN)/gankern train $(ARGS)

# One thread a worker: two workers with two spinning threads each are slower than one.
test: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

# On a machine with a GPU: the tests there, benchmarks, ten minutes of training. What each finds is in
# $(GPU); `make -k gpu` goes on where one fails.
gpu: gpu-tests gpu-bench gpu-train

gpu-tests: dev
	mkdir -p $(GPU)
	$(BIN)/gankern doctor > $(GPU)/doctor.txt
	$(BIN)/python -m pytest --device cuda --junitxml=$(GPU)/tests.xml $(ARGS)

gpu-bench: dev
	mkdir -p $(GPU)
	$(BIN)/python benchmarks/ops.py --device cuda --shapes 64 256 --compile --json $(GPU)/ops.jsonl
	$(BIN)/python benchmarks/ops.py --device cuda --shapes 256 --dtype f16 --channels-last --json $(GPU)/ops.jsonl
	$(BIN)/python benchmarks/steps.py --compile --json $(GPU)/steps.jsonl
	$(BIN)/python benchmarks/overhead.py --device cuda --json $(GPU)/overhead.jsonl
	$(BIN)/python benchmarks/predicted.py --measured --json $(GPU)/predicted.jsonl
	$(BIN)/python benchmarks/plots.py $(GPU)/ops.jsonl $(GPU)/steps.jsonl --out $(GPU)/plots

# 124 is the end of the ten minutes; what was trained until then is whole.
gpu-train: dev
	mkdir -p $(GPU)
	timeout 600 $(BIN)/gankern train --preset stylegan2 --kimg 100000 --device cuda --out $(GPU)/train || test $$? = 124
	$(BIN)/gankern report $(GPU)/train/0*

# The checked-out commit against BASE; fails where an op is slower by more than 15 %.
bench-compare: dev
	$(BIN)/python benchmarks/compare.py $(BASE) --fail-over 15 $(ARGS)

lint: dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run -Werror $(CSRC) && $(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(CSRC)

wheel-check: dev
	.ci/wheel-check $(BIN)/python

ci:
	.ci/run

clean:
	rm -rf build dist .ci/work gankern/*.so gankern/_build.json *.egg-info
