# The two commands: `make` sets everything up and runs the default experiment; `make test` tests the repo.
PYTHON ?= python3
TARGET ?= main
BIN := .venv/bin
# With the default shell, a Mac's make would look for commands in the PATH that it was started with, not in this one.
SHELL := bash
export PATH := $(CURDIR)/$(BIN):$(PATH)

SEEDS ?= 42 43 44

.PHONY: run test experiments report gate repeat bench recipes publish lint lock clean help
.DEFAULT_GOAL := run

run: $(BIN)/.installed  ## install, then run what has changed of the pipeline (dvc repro), and show the report
	dvc repro
	@sed '/^## /,$$d; /^!/d' metrics/report.md
	@echo 'The rest, with pictures and examples: metrics/report.md'

test: $(BIN)/.installed  ## run the tests (offline, ten to twenty-five minutes)
	pytest

# Sorted by the validation score: whoever picks the best by its test score has tuned to the test. Of the other columns,
# those that differ, and of these the params.
SHOWN := ((metrics/gain.json:)?validation.after|metrics/finetuned.json:(ndcg|mrr)@10)
experiments: $(BIN)/.installed  ## experiments and branches side by side, best on validation rows first
	dvc exp show --all-branches --only-changed --keep '$(SHOWN)' --sort-by metrics/gain.json:validation.after \
		--sort-order desc --drop '(?!Experiment|$(SHOWN)|(params.yaml:)?(prepare|models|train|evaluate)\.).*'

report: $(BIN)/.installed  ## what this branch does to the result, as CI comments it on a pull request (TARGET=main)
	@python stages/pull_request.py $(TARGET)

gate: $(BIN)/.installed  ## fail where the committed result is not of this code and these params, or gains too little
	@python stages/gate.py

# With a cache of its own, since a cached run would be no repetition; files that `dvc add` keeps come from the cache here.
repeat: $(BIN)/.installed  ## run all of the last commit anew in a clone, and compare dvc.lock and metrics/ byte for byte
	@clone=$$(mktemp -d) && trap 'rm -rf "$$clone"' EXIT && cache=$$(dvc cache dir) && git clone --quiet . "$$clone" && \
	cd "$$clone" && dvc cache dir --local .dvc/cache && dvc remote add --quiet --local here "$$cache" && \
	git ls-files -z '*.dvc' | xargs -0 -r dvc pull --quiet --remote here && dvc repro && \
	if git diff --quiet -- dvc.lock metrics; then echo 'The same, byte for byte.'; else \
	git diff --stat -- dvc.lock metrics; dvc metrics diff; echo 'Not the same.'; exit 1; fi

bench: $(BIN)/.installed  ## this training beside the library's own trainer: speed, memory, gain (SEEDS="42 43 44"; one to three hours, 8 GB)
	@pip install --quiet --requirement benchmarks/requirements.txt
	@python benchmarks/bench.py --seeds $(SEEDS)

recipes: $(BIN)/.installed  ## what each part of the recipe gives, and what was dropped, on validation rows (SEEDS="42 43 44"; hours)
	@pip install --quiet --requirement benchmarks/requirements.txt
	@python benchmarks/recipes.py --seeds $(SEEDS)

publish: $(BIN)/.installed  ## put the model on the Hub (TO=org/name LICENCE=apache-2.0; DRY_RUN=1 shows what would go)
	@python stages/publish.py "$(TO)" --licence "$(LICENCE)" $(if $(DRY_RUN),--dry-run)

lint: $(BIN)/.installed  ## check style
	ruff check .
	ruff format --check .

# Without CUDA's packages, which torch brings where there is CUDA: a Mac could not install them.
lock: $(BIN)/.installed  ## write requirements.txt anew from requirements.in, with the newest of what that leaves open
	pip install --quiet pip-tools
	pip-compile --quiet --upgrade --strip-extras --no-header --no-emit-index-url --no-emit-find-links --no-annotate \
		--output-file requirements.txt requirements.in
	sed -E -i.bak -e 's/^(torch==[0-9.]*)\+.*/\1/' -e '/^(cuda|nvidia|triton)[-=]/d' requirements.txt
	rm requirements.txt.bak

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
