# make demo | test | check | lab | realdata REALDATA=folder
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
REALDATA ?=
REALDATA_STEPS ?= 0
export HF_HUB_OFFLINE ?= 0
SHELL := /bin/bash

PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline REALDATA="$(abspath $(REALDATA))" $(BIN)/python -m pytest
OF_COMMANDS := $(addprefix tests/test_,check.py pipelines.py zero_shot.py)

.PHONY: help install install-dev demo test check readme lab realdata clean
help:
	@sed -n 's/^# make /targets: /p' Makefile

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# torch first and alone: an unpinned torch would pull another build with gigabytes of CUDA
$(VENV)/.installed: setup.py settings.ini constraints.txt
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing esm_perturb (a few minutes the first time)"
	@$(PIP) torch==2.13.0 2> >(grep -v '^WARNING: Location' >&2)
	@$(PIP) --editable . 2> >(grep -v '^WARNING: Location' >&2)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools"
	@$(PIP) --editable ".[dev]" 2> >(grep -v '^WARNING: Location' >&2)
	@touch $@

demo: install
	@$(BIN)/esm-perturb demo --output_dir reports/demo

check: install-dev
	@$(BIN)/python tests/check.py

test: check
	@echo "notebooks"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_test --n_workers 2 --timing 2> >(grep -v 'IPKernelApp' >&2)
	@echo "tests, those of whole commands beside the others"
	@log=$$(mktemp); $(PYTEST) $(OF_COMMANDS) > $$log 2>&1 & commands=$$!; \
	$(PYTEST) $(filter-out $(OF_COMMANDS),$(wildcard tests/test_*.py)); others=$$?; \
	wait $$commands; commands=$$?; cat $$log; rm -f $$log; exit $$(( others + commands ))

realdata: install
	@test -n "$(REALDATA)" || { echo "usage: make realdata REALDATA=folder, which holds perturb_seq/ and proteins/"; exit 2; }
	@$(BIN)/esm-perturb demo --realdata "$(REALDATA)" --max_steps $(REALDATA_STEPS) --output_dir reports/norman19_mcfaline23

readme: install-dev
	@$(BIN)/python tests/check.py --write-readme

lab: install-dev
	@$(BIN)/jupyter lab nbs

clean:
	rm -rf $(VENV) build dist *.egg-info reports/demo reports/norman19_mcfaline23
