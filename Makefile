# make demo | test | lint | bench        everything in .venv, made on first use
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test lint bench

demo: .venv/installed
	bash training/run_ddp.sh --data sample --model packaged --epochs 6 --global-batch-size 16
	python -m inference.model_loader "Shares rose after the bank raised its forecast"

test: .venv/installed-dev
	pytest

lint: .venv/installed-dev
	ruff check .

bench: .venv/installed-dev
	python -m benchmarks.bench_training $(ARGS)

.venv/installed: requirements.txt requirements-offline.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -r requirements-offline.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@
