# Every target builds the environment it needs. VENV=path chooses another folder, PYTHON=path another interpreter.
VENV ?= .venv
VENV_XLA ?= .venv-xla
VENV_XLA_COMPILE ?= .venv-xla-compile
PYTHON ?= $(shell command -v python3.11 || command -v python3)

ROOMS := $(filter-out tests,$(patsubst %/__init__.py,%,$(wildcard */__init__.py)))
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-input

.PHONY: install format check test test-distributed test-gpu test-xla xla-compile demo clean

install: $(VENV)/.installed

# The stamp is newer than the pins it was built from, so a changed pin reinstalls and nothing else does.
$(VENV)/.installed: requirements.txt setup.py
	@echo "Installing requirements.txt into $(VENV) (a few minutes the first time)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python $(PIP_INSTALL) $$(grep '^torch==' requirements.txt)
	@$(VENV)/bin/python $(PIP_INSTALL) -r requirements.txt
	@$(VENV)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV_XLA)/.installed: requirements-xla.txt requirements.txt setup.py
	@echo "Installing requirements-xla.txt into $(VENV_XLA) (6 GB, a few minutes the first time)"
	@test -x $(VENV_XLA)/bin/python || $(PYTHON) -m venv $(VENV_XLA)
	@grep -v '^torch' requirements.txt > $(VENV_XLA)/constraints.txt
	@$(VENV_XLA)/bin/python $(PIP_INSTALL) -r requirements-xla.txt -c $(VENV_XLA)/constraints.txt
	@$(VENV_XLA)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV_XLA_COMPILE)/.installed: requirements-xla-compile.txt
	@echo "Installing requirements-xla-compile.txt into $(VENV_XLA_COMPILE) (1 GB)"
	@test -x $(VENV_XLA_COMPILE)/bin/python || $(PYTHON) -m venv $(VENV_XLA_COMPILE)
	@$(VENV_XLA_COMPILE)/bin/python $(PIP_INSTALL) -r requirements-xla-compile.txt
	@touch $@

format: $(VENV)/.installed
	@$(VENV)/bin/ruff check --quiet --fix .
	@$(VENV)/bin/ruff format --quiet .

# lint-imports explains itself at length: shown only when a contract is broken.
check: $(VENV)/.installed
	@$(VENV)/bin/ruff check --quiet --output-format=concise .
	@$(VENV)/bin/ruff format --quiet --diff .
	@$(VENV)/bin/mypy --no-error-summary $(addprefix -p openmoe.,$(ROOMS))
	@report=$$($(VENV)/bin/lint-imports --no-logo 2>&1) || { echo "$$report"; exit 1; }
	@$(VENV)/bin/python -m pytest -q --no-header -p no:cacheprovider tests/test_tree.py
	@echo "check: clean"

test: $(VENV)/.installed
	@$(VENV)/bin/python -m pytest -q

# An empty -m takes in what `make test` leaves out; elsewhere there are a few such tests too.
test-distributed: $(VENV)/.installed
	@$(VENV)/bin/python -m pytest -q -m "" tests/distributed
	@$(VENV)/bin/python -m pytest -q -m distributed --ignore=tests/distributed

# The same cases with NCCL, each rank on a GPU of its own; those with more ranks than GPUs are skipped.
test-gpu: $(VENV)/.installed
	@OPENMOE_TEST_DEVICE=cuda $(VENV)/bin/python -m pytest -q -m "" tests/train/test_step.py $(addprefix tests/distributed/test_,layouts.py gradient_groups.py golden.py traffic.py)

# Eight virtual devices. Level 0 makes the CPU back end compile several times faster; the traced program is the
# same, and level 2 hides a warning of each compilation. What is traced for another compiler has a process of its own;
# the last line runs the shared path without XLA.
test-xla: $(VENV_XLA)/.installed
	@PJRT_DEVICE=CPU CPU_NUM_DEVICES=8 XLA_FLAGS=--xla_backend_optimization_level=0 TF_CPP_MIN_LOG_LEVEL=2 $(VENV_XLA)/bin/python -m pytest -q tests/xla --ignore=tests/xla/test_compile.py
	@PJRT_DEVICE=CPU CPU_NUM_DEVICES=8 XLA_FLAGS=--xla_backend_optimization_level=0 TF_CPP_MIN_LOG_LEVEL=2 $(VENV_XLA)/bin/python -m pytest -q tests/xla/test_compile.py
	@$(VENV_XLA)/bin/python -m pytest -q tests/model tests/optim tests/checkpoint tests/parity

# One training step through the compiler of TPU v3, no TPU needed. CASES="base_1_8_1 ..." takes some of the table
# (docs/tpu.md); all of them take an hour.
xla-compile: $(VENV_XLA)/.installed $(VENV_XLA_COMPILE)/.installed
	@$(VENV_XLA)/bin/python -m benchmarks.xla_compile --compiler $(VENV_XLA_COMPILE)/bin/python $(CASES)

demo: $(VENV)/.installed
	@$(VENV)/bin/python -m openmoe.launcher.train experiment=tiny run.dir=runs/demo checkpoint.resume=auto
	@$(VENV)/bin/python -m openmoe.launcher.report run.dir=runs/demo

# Caches and build leftovers; environments and runs stay.
clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
