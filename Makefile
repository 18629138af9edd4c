# Everything runs in the project's own .venv, made on first use.
#   make demo       train on real handwritten digits, sample, look
#   make test       format, lint, types, tests
#   make test-oldest  the tests of what depends on diffusers' versions, with the oldest supported one
# For CUDA: make demo CONSTRAINTS=/dev/null (the pins of .constraints.txt take torch's CPU build where there is one).

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .constraints.txt
OLDEST ?= .venv-oldest
OLDEST_PATH = $(abspath $(OLDEST))
OLDEST_TESTS ?= $(addprefix tests/test_,hub.py pipelines.py schedulers.py contract.py swap.py swap_pipelines.py)
OUTPUT ?= outputs/demo
METHOD ?= gm-sgm
STEPS ?= 1200

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo compare test test-oldest test-slow lint format benchmark clean-env

$(STAMP): pyproject.toml $(wildcard $(CONSTRAINTS))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/accelerate launch --num_processes 1 --mixed_precision no --dynamo_backend no --num_machines 1 train_gm_sgm.py \
		--dataset_name digits --method $(METHOD) --max_train_steps $(STEPS) --output_dir $(OUTPUT) --overwrite_output_dir
	$(BIN)/python -m diffusers_gm.demo $(OUTPUT)

# The same with one component (K = 1, NCSNv2's noise), and both in one table.
compare: demo
	$(BIN)/accelerate launch --num_processes 1 --mixed_precision no --dynamo_backend no --num_machines 1 train_gm_sgm.py \
		--dataset_name digits --method $(METHOD) --mixture_weights 1 --mixture_scales 1 --max_train_steps $(STEPS) \
		--output_dir $(OUTPUT)-k1 --overwrite_output_dir
	$(BIN)/python -m diffusers_gm.demo $(OUTPUT) --compare $(OUTPUT)-k1

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The oldest diffusers that is supported, laid over the environment: what it shares with the Hub and with pipelines.
$(OLDEST)/.installed: $(STAMP)
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(OLDEST) \
		diffusers==0.40.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
	@touch $@

test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST_PATH) $(BIN)/python -c "import diffusers as d; assert d.__version__ == '0.40.0', d.__version__"
	PYTHONPATH=$(OLDEST_PATH) $(BIN)/python -m pytest -n 2 --dist worksteal $(OLDEST_TESTS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(STAMP)
	$(BIN)/python -m diffusers_gm.benchmark

clean-env:
	rm -rf $(VENV) $(OLDEST)
