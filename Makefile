# Every target makes the environment it needs; Python 3.10 or newer, make and git are all that must be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help env demo test check bench clean

help:
	@echo "make demo   render rooms, pretrain, transfer, evaluate: runs/demo/report.html (about 5 minutes on 2 cores)"
	@echo "make test   the test suite (no network, no GPU needed)"
	@echo "make check  ruff format, ruff lint, pyright"
	@echo "make bench  time and memory of a training step, speed of the loader here (OFFICIAL=a clone of SparK compares with the original)"

env: .venv/.installed

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade uv
	$(BIN)/uv pip install -q --python $(BIN)/python -e ".[dev,demo]"
	touch $@

demo: env
	$(BIN)/python tools/demo.py --output_dir runs/demo

test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: env
	for what in step encoder memory; do \
	    $(BIN)/python tools/benchmark.py $$what $(if $(OFFICIAL),--official $(OFFICIAL)) \
	        --csv docs/results/benchmark_$$what.csv || exit 1; \
	done
	$(BIN)/python tools/benchmark.py loader --csv docs/results/benchmark_loader.csv

clean:
	rm -rf .venv runs build dist *.egg-info
