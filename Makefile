# The two commands: `make` sets everything up and runs the default experiment; `make test` tests the repo.
PYTHON ?= python3
TARGET ?= main
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: run test experiments report gate lint lock clean help
.DEFAULT_GOAL := run

run: $(BIN)/.installed  ## install, then run what has changed of the pipeline (dvc repro), and show the report
	dvc repro
	@sed '/^## /,$$d; /^!/d' metrics/report.md
	@echo 'The rest, with pictures and examples: metrics/report.md'

test: $(BIN)/.installed  ## run the tests (offline, a few minutes)
	pytest

# Sorted by the validation score: whoever picks the best by its test score has tuned to the test. Of the other columns,
# those that differ, and of these the params.
SHOWN := metrics/(gain.json:validation.after|finetuned.json:(ndcg|mrr)@10)
experiments: $(BIN)/.installed  ## experiments and branches side by side, best on validation rows first
	dvc exp show --all-branches --only-changed --keep '$(SHOWN)' --sort-by metrics/gain.json:validation.after \
		--sort-order desc --drop '(?!Experiment|$(SHOWN)|(params.yaml:)?(prepare|models|train|evaluate)\.).*'

report: $(BIN)/.installed  ## what this branch does to the result, as CI comments it on a pull request (TARGET=main)
	@python stages/pull_request.py $(TARGET)

gate: $(BIN)/.installed  ## fail where the gain may be below evaluate.minimum_gain
	@python stages/gate.py

lint: $(BIN)/.installed  ## check style
	ruff check .
	ruff format --check .

lock: $(BIN)/.installed  ## write requirements.txt anew from requirements.in
	pip install --quiet pip-tools
	pip-compile --quiet --strip-extras --no-header --no-emit-index-url --no-emit-find-links --no-annotate \
		--output-file requirements.txt requirements.in
	sed -i.bak 's/^\(torch==[0-9.]*\)+.*/\1/' requirements.txt && rm requirements.txt.bak

clean:  ## remove checkpoints and logs of earlier runs, and rendered plots
	rm -rf models/scratch dvc_plots

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

$(BIN)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "Installing the packages of requirements.txt into .venv (two minutes or so)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --requirement requirements.txt
	@touch $@
