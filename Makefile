# `make demo` and `make test` do everything from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
RUNS ?= runs

# Two spinning threads beside another process make small models 30 times slower: one thread each, no spinning.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive

.PHONY: install demo test test-slow test-floor lint format bench bench-gpu matrix pipelines compatibility architectures \
	adaptive calibrations everything tokens peers reference clean

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install  ## the main job on the embedded reference model: report.html and results.json in $(OUT)
	OMP_NUM_THREADS=2 $(BIN)/c4d demo --out $(OUT)

test: install  ## the tests, in two processes
	$(BIN)/pytest -n 2

test-slow: install  ## checks that take minutes
	$(BIN)/pytest -n 2 -m slow

test-floor:  ## the core tests with the oldest diffusers that is supported
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/pip install --quiet --disable-pip-version-check --constraint constraints-floor.txt \
		--editable ".[reference]" peft pytest pytest-xdist hypothesis
	.venv-floor/bin/pytest -n 2 tests/invariants tests/test_gates.py tests/test_predictors.py tests/test_run.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python src

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## cost of a cached step, ours beside peers
	$(BIN)/python benchmarks/cached_step.py

bench-gpu: install  ## FLUX.1-dev at its real size with random weights, on a CUDA device: docs/benchmarks/gpu-flux.1-dev
	$(BIN)/python benchmarks/gpu.py

matrix: install  ## every method on tiny pipelines, every class of diffusers: docs/benchmarks/matrix.* and zoo.*
	$(BIN)/python benchmarks/matrix.py
	PYTHONPATH=tests $(BIN)/python benchmarks/zoo.py

pipelines: install  ## stock pipelines by task, guidance and scheduler: docs/benchmarks/pipelines.json and .md
	PYTHONPATH=tests $(BIN)/python -m pipelines

compatibility: install  ## what else people put on a pipeline, before and after: docs/compatibility.json and .md
	PYTHONPATH=tests $(BIN)/python -m companions

architectures: install  ## full steps, states and speed-ups by architecture: docs/benchmarks/architectures.json and .md
	PYTHONPATH=tests $(BIN)/python benchmarks/architectures.py

adaptive: install  ## thresholds and rows of adaptive methods on the reference model: docs/benchmarks/adaptive.json and .md
	$(BIN)/python benchmarks/adaptive.py

calibrations: install  ## on the reference model, and beside what needs none: docs/benchmarks/calibrated.json and .md
	$(BIN)/python benchmarks/calibrations.py
	$(BIN)/python benchmarks/calibrated.py

everything: calibrations  ## every method from gentle to hard, then the front: docs/benchmarks/all-methods*
	$(BIN)/python benchmarks/everything.py
	$(BIN)/python benchmarks/everything.py --front

tokens: install  ## token rules beside FORA and TaylorSeer at equal FLOPs, on three reference models: docs/benchmarks/tokens*
	$(BIN)/python benchmarks/tokens.py
	$(BIN)/python benchmarks/tokens.py --model scenes-flux --size 256
	$(BIN)/python benchmarks/tokens.py --model scenes-dit

peers: install  ## other packages' methods beside ours, on the reference model (MODEL=...): docs/benchmarks/peers-*
	$(BIN)/python benchmarks/peers.py --model $(or $(MODEL),scenes-flux)

reference: install  ## trains and builds the reference models that are missing (or MODELS="scenes-dit ..."): hours; goes on
	$(BIN)/python -m cache4diffusion.reference.make $(MODELS) --runs $(RUNS)

clean:
	rm -rf $(VENV) .venv-floor $(OUT) .pytest_cache .ruff_cache .hypothesis
