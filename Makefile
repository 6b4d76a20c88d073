# Every target makes the environment it needs; Python 3.10 or newer, make and git are all that must be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help env demo test check bench gpu clean

help:
	@echo "make demo   render rooms, pretrain, transfer, evaluate: runs/demo/report.html (about 5 minutes on 2 cores)"
	@echo "make test   the test suite (no network, no GPU needed)"
	@echo "make check  ruff format, ruff lint, pyright"
	@echo "make bench  time and memory of a training step, speed of the loader here, half an hour: runs/bench/benchmark_*"
	@echo "            (OFFICIAL=a clone of SparK compares with the original; ROUNDS=7 for more of each;"
	@echo "            MEASURED=docs/results/benchmark takes the place of the committed results)"
	@echo "make gpu    the tests and the benchmarks that need a GPU: runs/bench/gpu_* (OFFICIAL and ROUNDS as above)"

env: .venv/.installed

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade uv
	$(BIN)/uv pip install -q --python $(BIN)/python -e ".[dev,demo]"
	touch $@

demo: env
	$(BIN)/python -m tools.demo --output_dir runs/demo

test: env
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

BENCHMARK = $(BIN)/python -m tools.benchmark
ORIGINAL = $(if $(OFFICIAL),--official $(OFFICIAL))
MEASURED ?= runs/bench/benchmark
LEAN ?= 256/5/3
ROUNDS ?= 3
OPTIONS ?=
LOADER_OPTIONS ?= $(filter --busy,$(OPTIONS))

bench: env
	$(BENCHMARK) encoder $(ORIGINAL) --rounds $(ROUNDS) $(OPTIONS) --csv $(MEASURED)_encoder.csv
	$(BENCHMARK) step $(ORIGINAL) --rounds $(ROUNDS) $(OPTIONS) --csv $(MEASURED)_step.csv
	$(BENCHMARK) step --decoder $(LEAN) $(ORIGINAL) --rounds $(ROUNDS) $(OPTIONS) --csv $(MEASURED)_step_lean.csv
	$(BENCHMARK) memory --decoder $(LEAN) $(ORIGINAL) $(OPTIONS) --csv $(MEASURED)_memory.csv
	$(BENCHMARK) scaling --model resnet50 --batch 4 --mask_ratio 0.3 0.45 0.6 0.75 0.9 $(ORIGINAL) \
	    --rounds $(ROUNDS) $(OPTIONS) --csv $(MEASURED)_scaling.csv --plot $(MEASURED)_scaling.png
	$(BENCHMARK) scaling --model resnet50 --batch 4 --mask_ratio 0.6 --processes 1 2 \
	    --rounds $(ROUNDS) $(OPTIONS) --csv $(MEASURED)_processes.csv
	$(BENCHMARK) loader --rounds $(ROUNDS) $(LOADER_OPTIONS) --csv $(MEASURED)_loader.csv

GPU = --device cuda --precision fp32 bf16 --batch 64 $(ORIGINAL) --rounds 20 $(OPTIONS) --csv runs/bench/gpu

gpu: env
	$(BIN)/python -m pytest -n 0 -m gpu
	$(BENCHMARK) encoder --layouts packed triton $(GPU)_encoder.csv
	$(BENCHMARK) step --layouts packed triton $(GPU)_step.csv
	$(BENCHMARK) step --decoder $(LEAN) --layouts packed triton $(GPU)_step_lean.csv
	$(BENCHMARK) memory --decoder $(LEAN) --layouts packed triton $(GPU)_memory.csv
	$(BENCHMARK) layouts --device cuda --batch 64 --rounds 20 $(OPTIONS) --csv runs/bench/gpu_layouts.csv

clean:
	rm -rf .venv runs build dist *.egg-info
