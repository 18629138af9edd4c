# Everything runs in the project's own .venv, made on first use.
#   make demo       train on real handwritten digits, sample, look
#   make cifar10    train on CIFAR-10, a slice of MINUTES a call, and measure when it is complete
#   make test       format, lint, types, tests
#   make docs       a site of the documentation in outputs/docs
#   make test-oldest  the tests of what depends on diffusers' versions, with the oldest supported one
#   make test-lowest  the tests of every dependency, with the lowest versions that pyproject.toml allows
#   make test-python  the tests of what depends on Python's version, with those of PYTHONS that there are
# For CUDA: make demo CONSTRAINTS=/dev/null (the pins of .constraints.txt take torch's CPU build where there is one).

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .constraints.txt
OLDEST ?= .venv-oldest
LOWEST ?= .venv-lowest
OLDEST_PATH = $(abspath $(OLDEST))
OLDEST_TESTS ?= $(addprefix tests/test_,hub.py hub_again.py pipelines.py schedulers.py contract.py swap.py swap_pipelines.py)
METHOD ?= gm-sgm
demo compare: OUTPUT ?= outputs/demo$(if $(filter-out gm-sgm,$(METHOD)),-$(METHOD))
DEMO ?=
benchmark: STEPS ?= 1200
RESULTS ?= outputs/benchmark

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV := $(BIN)/uv pip install -q --system-certs
TRAIN := $(BIN)/accelerate launch --quiet --num_processes 1 --mixed_precision no --dynamo_backend no --num_machines 1 train_gm_sgm.py

# STEPS=500: another length than that of the recipe.
LENGTH = $(if $(STEPS),--max_train_steps $(STEPS))

.PHONY: demo compare cifar10 docs test test-oldest test-lowest test-python test-slow lint format benchmark clean-env

$(STAMP): pyproject.toml $(wildcard $(CONSTRAINTS))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

# Interrupted, it goes on where it was: a complete training is not done again, nor a cell that is measured.
TRAINED = test -f $(1)/model_index.json && grep -q '"training_seconds"' $(1)/training_args.json \
	$(if $(STEPS),&& grep -q '"max_train_steps": $(STEPS)[^0-9]*$$' $(1)/training_args.json)
TRAIN_DIGITS = { $(TRAINED); } || $(TRAIN) --config digits --method $(METHOD) $(LENGTH) \
	--checkpointing_steps 100 --checkpoints_total_limit 1 --resume_from_checkpoint latest --output_dir $(1)

demo: $(STAMP)
	$(call TRAIN_DIGITS,$(OUTPUT))
	$(BIN)/python -m diffusers_gm.studies.demo $(OUTPUT) $(DEMO)

# The same with one component (K = 1, NCSNv2's noise), and both in one table.
compare: demo
	$(call TRAIN_DIGITS,$(OUTPUT)-k1) --mixture_weights 1 --mixture_scales 1
	$(BIN)/python -m diffusers_gm.studies.demo $(OUTPUT) --compare $(OUTPUT)-k1 $(DEMO)

# CIFAR-10, from the Hub or a folder of parquet files or images, by diffusers_gm/training/recipes/cifar10-$(SCALE).yaml.
# At its end the model is measured under the samplers of its method and, where they can read it, diffusers' (K = 1 can).
SCALE ?= gpu
DATA ?= uoft-cs/cifar10
MINUTES ?= 9
ifeq ($(filter cpu gpu,$(SCALE)),)
$(error SCALE must be cpu or gpu, got '$(SCALE)')
endif
cifar10: OUTPUT ?= outputs/cifar10-$(METHOD)-$(SCALE)
cifar10: EVALUATION ?= $(EVALUATION_$(SCALE))
cifar10: CALLS ?= $(CALLS_$(SCALE))
cifar10: SAMPLERS ?= $(SAMPLERS_$(METHOD))

CALLS_gpu := 10 20 50 200
EVALUATION_gpu := --num_samples 2000
CALLS_cpu := 10 20 50
EVALUATION_cpu := --num_samples 250 --num_reference 2000

MULTISTEP := --scheduler CalibratedMultistepScheduler stochasticity=1
SAMPLERS_gm-sgm := --scheduler GMLangevinScheduler --scheduler GMLangevinScheduler algorithm_type=ode \
	--scheduler GMLangevinScheduler algorithm_type=langevin network_level=chain
SAMPLERS_ncsnv2 := --scheduler AnnealedLangevinScheduler --scheduler AnnealedLangevinScheduler network_level=chain \
	--scheduler AnnealedLangevinScheduler algorithm_type=consistent --scheduler CLDSSCSScheduler \
	--scheduler EDMEulerScheduler --scheduler EDMDPMSolverMultistepScheduler \
	--scheduler EDMDPMSolverMultistepScheduler algorithm_type=sde-dpmsolver++
SAMPLERS_cld := --scheduler CLDSSCSScheduler --scheduler CLDSSCSScheduler splitting_order=2 \
	--scheduler CLDSSCSScheduler algorithm_type=probability_flow

DATA_IN = $(if $(wildcard $(DATA)),--train_data_dir,--dataset_name) $(DATA)

# One slice of the training a call. The folder holds a pipeline when the training is complete, and not before.
cifar10: $(STAMP)
	$(TRAIN) --config cifar10-$(SCALE) $(DATA_IN) --method $(METHOD) $(LENGTH) \
		--max_train_minutes $(MINUTES) --resume_from_checkpoint latest --output_dir $(OUTPUT)
	test ! -f $(OUTPUT)/model_index.json || $(BIN)/python -m diffusers_gm.evaluation $(OUTPUT) $(DATA_IN) \
		--calls $(CALLS) $(EVALUATION) $(SAMPLERS) $(MULTISTEP) --output_dir $(OUTPUT)

docs: $(STAMP)
	$(BIN)/python -m diffusers_gm.docs.build --output outputs/docs

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

# The lowest versions of all dependencies that pyproject.toml names, in two steps: resolved at once, the resolver gives
# some of them up.
LOWEST_TESTS ?= $(PYTHON_TESTS) $(addprefix tests/test_,app.py app_page.py docs.py evaluation.py hub.py hub_again.py likelihood.py \
	pictures.py swap_pipelines.py training_steps.py)

$(LOWEST)/.installed: $(STAMP)
	$(PYTHON) -m venv $(LOWEST)
	for extra in test dev; do \
		$(UV) -p $(LOWEST)/bin/python --resolution lowest-direct -e ".[$$extra]" || exit 1; \
	done
	@touch $@

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -n 2 --dist worksteal $(LOWEST_TESTS)

# Other versions of Python, each in an environment of its own; one that is not on this machine is passed over, and said.
# torch may be its CUDA build there, several GB, which uv installs in a fraction of pip's time.
PYTHONS ?= 3.12 3.13
PYTHON_TESTS ?= $(addprefix tests/test_,options.py recipe.py commands.py saved.py schedulers.py pipelines.py data.py)
find_python = $(shell for p in python$(1) $(HOME)/.pyenv/versions/$(1).*/bin/python; do $$p -c "" 2>/dev/null && echo $$p && break; done)

test-python: $(STAMP)
	@$(foreach version,$(PYTHONS),$(if $(call find_python,$(version)),,echo "there is no Python $(version)";))
	$(foreach version,$(PYTHONS),$(if $(call find_python,$(version)),$(call test_with,$(version),$(call find_python,$(version)))))

define test_with
test -x $(VENV)-$(1)/bin/python || $(2) -m venv $(VENV)-$(1)
$(UV) -p $(VENV)-$(1)/bin/python -c $(CONSTRAINTS) -e ".[test]" \
	|| $(VENV)-$(1)/bin/python -m pip install -q -c $(CONSTRAINTS) -e ".[test]"
$(VENV)-$(1)/bin/python -m pytest -n 2 --dist worksteal $(PYTHON_TESTS)

endef

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Quality and wall time of every sampler at equal network calls, ours and diffusers'; then what `step` costs. It goes on
# where it was interrupted. QUICK=1: minutes, the exact denoiser alone.
benchmark: $(STAMP)
ifdef QUICK
	$(BIN)/python -m diffusers_gm.studies.sampler_benchmark --calls 5 10 20 --num_samples 250 --seeds 1 --output $(RESULTS)
else
	$(BIN)/python -m diffusers_gm.studies.sampler_benchmark --models exact --calls 5 10 20 50 200 1000 --output $(RESULTS)
	$(BIN)/python -m diffusers_gm.studies.sampler_benchmark --models erring erring-much mixture-2 mixture-16 mixture-512 mixture-3072 \
		--calls 5 8 10 15 20 30 50 --output $(RESULTS)
	$(BIN)/python -m diffusers_gm.studies.sampler_benchmark --models ddpm ncsnv2 gm-sgm cld --num_samples 256 \
		--calls 5 10 20 50 200 1000 --steps $(STEPS) --output $(RESULTS)
	$(BIN)/python -m diffusers_gm.studies.sampler_benchmark --models ddpm --num_samples 256 \
		--calls 5 10 20 50 --steps $$((4 * $(STEPS))) --output $(RESULTS)
endif
	$(BIN)/python -m diffusers_gm.studies.sampler_benchmark_settings --output $(RESULTS)
	$(BIN)/python -m diffusers_gm.studies.step_cost --output $(RESULTS)
	$(BIN)/python -m diffusers_gm.studies.page --reports $(RESULTS) --output $(RESULTS)/results.md

clean-env:
	rm -rf $(VENV) $(OLDEST) $(LOWEST) $(addprefix $(VENV)-,$(PYTHONS))
