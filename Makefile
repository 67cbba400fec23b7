# not /bin/bash: make of macOS would look plain commands up in the PATH of before
SHELL := bash
# everything runs in .venv, which is made on first use; PYTHON=python3.12 makes one with another Python
PYTHON ?= python3
PORT ?= 7860
BIN := .venv/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none)
INSTALLED := .venv/installed-$(VERSION)
export PATH := $(CURDIR)/$(BIN):$(PATH)

# else run_ddp.sh would take that one in place of .venv's
unexport PYTHON
.PHONY: demo test test-slow serve lint bench faults kaggle report

demo: $(INSTALLED)
	bash training/run_ddp.sh --data sample --model packaged --epochs 6 --global-batch-size 16 --lr 2e-4
	PORT=$(PORT) bash inference/try_it.sh
	@echo "next: source .venv/bin/activate, and any command of the README"

test: $(INSTALLED)-dev
	pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(INSTALLED)-dev
	pytest -m slow

serve: $(INSTALLED)
	uvicorn inference.app:app --port $(PORT) --http h11

lint: $(INSTALLED)-dev
	ruff check .

bench: $(INSTALLED)-dev
	python -m benchmarks.bench_training $(ARGS)

faults: $(INSTALLED)-dev
	python -m tests.faults.kill --out benchmarks/results/faults_kill.json
	python -m tests.faults.corrupt --out benchmarks/results/faults_corrupt.json
	python -m tests.faults.serve --out benchmarks/results/faults_serve.json

kaggle:
	$(PYTHON) -m benchmarks.kaggle.bundle

report: $(INSTALLED)-dev
	python -m benchmarks.report

$(INSTALLED): requirements.txt requirements-offline.txt constraints.txt
	@case "$(VERSION)" in 3.1[1-9]) ;; *) echo "error: Python 3.11 or newer is needed, and \
	$(PYTHON) has version: $(VERSION); try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1;; esac
	@echo "installing into .venv: about 2 GB with PyTorch's CPU build, 6 GB with CUDA's libraries"
	@rm -f .venv/installed-*
	@[ -x $(BIN)/python$(VERSION) ] || PATH="$${PATH#*:}" $(PYTHON) -m venv --clear .venv
	@[ -x $(BIN)/pip ] || $(BIN)/python -m ensurepip --default-pip  # uv makes none
	$(BIN)/pip install -r requirements.txt -c constraints.txt
	$(BIN)/pip install --no-deps -r requirements-offline.txt
	@touch $@

$(INSTALLED)-dev: $(INSTALLED) requirements-dev.txt
	$(BIN)/pip install -r requirements-dev.txt -c constraints.txt
	@touch $@
