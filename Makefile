# `make train` and `make test` work on a fresh machine: both set everything up first, once.
PYTHON_IN_VENV := .venv/bin/python
LAUNCH := .venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: setup train test test-slow test-gpu test-faults test-browser test-stream lint

setup:
	@tools/setup.sh

train: setup
	@$(LAUNCH) fastlt/train.py recipes/digits_lt.yaml

test: setup lint
	@$(PYTHON_IN_VENV) -m pytest

test-slow: setup
	@$(PYTHON_IN_VENV) -m pytest -m "slow and not gpu"

test-gpu: setup
	@$(PYTHON_IN_VENV) -m pytest -m gpu

test-faults: setup
	@$(PYTHON_IN_VENV) -m pytest -m faults tests/faults

test-browser: setup
	@$(PYTHON_IN_VENV) -m pytest -m browser tests/browser

test-stream: setup
	@$(PYTHON_IN_VENV) -m pytest -m stream tests/stream

lint: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/basedpyright --pythonpath $(PYTHON_IN_VENV)
