# everything in .venv, made on first use
PYTHON ?= python3
PORT ?= 7860
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test serve lint bench faults kaggle report

demo: .venv/installed
	bash training/run_ddp.sh --data sample --model packaged --epochs 6 --global-batch-size 16 --lr 2e-4
	PORT=$(PORT) bash inference/try_it.sh

test: .venv/installed-dev
	pytest -n 2 --dist loadfile

serve: .venv/installed
	uvicorn inference.app:app --port $(PORT)

lint: .venv/installed-dev
	ruff check .

bench: .venv/installed-dev
	python -m benchmarks.bench_training $(ARGS)

faults: .venv/installed-dev
	python -m tests.faults.kill --out benchmarks/results/faults_kill.json
	python -m tests.faults.corrupt --out benchmarks/results/faults_corrupt.json
	python -m tests.faults.serve --out benchmarks/results/faults_serve.json

kaggle:
	$(PYTHON) -m benchmarks.kaggle.bundle

report: .venv/installed-dev
	python -m benchmarks.report

.venv/installed: requirements.txt requirements-offline.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -r requirements-offline.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@
