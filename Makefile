# make train: set up and run the main job. make test: set up and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
GPU = runs/gpu
GPU_LIMIT = 7200
GPU_RUN = --preset stylegan2-256 --data digits:256 --no-mirror --augment none --batch 32 --cuda-graphs --device cuda
CSRC = $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu)

.PHONY: setup dev build train test gpu gpu-build gpu-tests gpu-bench gpu-train bench-compare lint format wheel-check ci clean

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
# $(GPU). A line that fails, tests or a benchmark also where they take GPU_LIMIT seconds, is told at the end,
# and with it the target fails; the others run.
gpu:
	$(MAKE) -k -j1 gpu-tests gpu-bench gpu-train

begin = @mkdir -p $(GPU) && rm -f $(GPU)/$@.failed
try = $(1) || echo '$(subst ','\'',$(1))' >> $(GPU)/$@.failed
end = @[ ! -e $(GPU)/$@.failed ] || { echo '$@: failed:'; cat $(GPU)/$@.failed; exit 1; }
bench = $(call try,timeout $(GPU_LIMIT) $(BIN)/python benchmarks/$(1))

# The library of these sources, by a compiler from PyPI where none is of torch's CUDA. Fails where the CUDA
# library or the extension was not built now, or does not load, with the reason and the cure.
gpu-build: dev
	$(BIN)/python -c 'import torch; torch.cuda.init()'
	$(BIN)/python -c 'import os, sys; from gankern import _toolchain as t; \
	  sys.exit(not isinstance(t.find_nvcc(t.find_torch(), os.environ, sys.path), t.Nvcc))' || \
	  $(BIN)/python -m pip install -q \
	  "cuda-toolkit[nvcc,cccl]==$$($(BIN)/python -c 'import torch; print(torch.version.cuda)').*"
	$(BIN)/python setup.py build_ext --inplace
	$(BIN)/python -c 'import json, sys; from gankern.ops import _impl, _remember; \
	  cuda = json.load(open("gankern/_build.json"))["cuda"]; \
	  sys.exit(cuda.get("kept") or cuda.get("reason") or _impl.LIBRARIES["cuda"] or _remember.why_not() or 0)'

gpu-tests: gpu-build
	$(begin)
	$(call try,$(BIN)/gankern doctor > $(GPU)/doctor.txt)
	$(call try,OMP_NUM_THREADS=2 timeout $(GPU_LIMIT) $(BIN)/python -m pytest -n 4 --dist loadgroup --device cuda --junitxml=$(GPU)/tests.xml $(ARGS))
	$(end)

gpu-bench: gpu-build
	$(begin)
	$(call bench,ops.py --device cuda --shapes dcgan-64 64 256 1024 --compile --json $(GPU)/ops.jsonl)
	$(call bench,ops.py --device cuda --shapes 256 --batch 32 --json $(GPU)/ops.jsonl)
	$(call bench,ops.py --device cuda --shapes 256 --batch 32 --dtype f16 --layout channels-last --json $(GPU)/ops.jsonl)
	$(call bench,steps.py --compile --json $(GPU)/steps.jsonl)
	$(call bench,steps.py --model stylegan2-256-f16 --batch 32 --rounds 3 --step generate G D --cuda-graphs --json $(GPU)/steps.jsonl)
	$(call bench,steps.py --scaling --json $(GPU)/steps.jsonl)
	$(call bench,overhead.py --device cuda --json $(GPU)/overhead.jsonl)
	$(call bench,predicted.py --measured --json $(GPU)/predicted.jsonl)
	$(call bench,launches.py --json $(GPU)/launches.jsonl)
	$(call bench,plots.py $(GPU)/ops.jsonl $(GPU)/steps.jsonl --out $(GPU)/plots)
	$(end)

# 124 is the end of the ten minutes; what was trained until then is whole. The report is of the newest run.
gpu-train: gpu-build
	$(begin)
	$(call try,timeout 600 $(BIN)/gankern train $(GPU_RUN) --out $(GPU)/train || test $$? = 124)
	$(call try,$(BIN)/gankern report $$(ls -d $(GPU)/train/[0-9]*/ | tail -n 1))
	$(end)

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
