# make train: set up and run the main job. make test: set up and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CSRC = $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu)

.PHONY: setup dev build train test gpu bench-compare lint format wheel-check ci clean

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

gpu: dev
	$(BIN)/python -m pytest --device cuda $(ARGS)

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
