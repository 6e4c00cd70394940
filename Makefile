# Two commands are enough: `make retrain` (the whole DAG on this machine) and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PRESET ?= mini
LAKE ?= lake
MARK ?= not benchmark and not thorough
BIN := .venv/bin

.PHONY: help venv retrain test test-thorough bench lint clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

venv: .venv/.stamp  ## the environment, exactly as tested

.venv/.stamp: pyproject.toml infra/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e '.[dev,nsfw,ocr,mlx]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c infra/constraints.txt dashscope mlx-vlm  # for tests: ranks of the true tokenizer, and who reads the encoder's 4-bit weights
	touch $@

retrain: venv    ## raw data to phone artifact and report; PRESET=smoke|mini|mini-long|paper LAKE=lake
	$(BIN)/dreamlite retrain --preset $(PRESET) --lake $(LAKE)

# A process that dies, and a test that hangs, end the run with their names: pytest-xdist waits for ever after a restart.
PYTEST := $(BIN)/python -m pytest tests -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0 \
	-o faulthandler_timeout=1200 -o faulthandler_exit_on_timeout=true

test: venv       ## the fast tests: everything but the thorough ones and benchmarks
	$(PYTEST) -m "$(MARK)"

test-thorough: venv ## whole refreshes and exports again: other executors, other task sizes, kills
	$(PYTEST) -m thorough

bench: venv      ## measurements as 'BENCH name value target ok|short' lines
	$(BIN)/python -m pytest tests/benchmarks -m benchmark -s -q

lint: venv       ## ruff
	$(BIN)/ruff check dreamlite_data trainers flows tests

clean:           ## caches and build leftovers; never the lake
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
