# One environment for everything; another Python goes to another folder: PYTHON=python3.13 make test
PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(notdir $(PYTHON))),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL = 3

# make demo DEVICES=2: as many CPU devices, so that the training takes the pmap path. NPROC: threads
# for XLA, more than the devices can block by waiting for each other.
MANY = $(if $(DEVICES),NPROC=32 XLA_FLAGS=--xla_force_host_platform_device_count=$(DEVICES))

.PHONY: setup demo test types mutants fuzz soak crowd browser docs lint parity bench accelerator clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.core: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.%: pyproject.toml | $(VENV)/.core
	$(BIN)/python -m pip install --quiet -e ".[$*]"
	touch $@

setup: $(VENV)/.core

demo: $(VENV)/.demo
	$(MANY) $(BIN)/python train.py --config=configs/openmoji_autoencoder.py --workdir=runs/demo/first_stage
	$(MANY) $(BIN)/python train.py --config=configs/openmoji_text.py --workdir=runs/demo/denoiser
	$(BIN)/python -m demo.openmoji --workdir=runs/demo

# Shapes and dtypes of arguments are checked at run time where networks and processes are tested part
# by part. Checks take a third of the time of a test of whole models: `make types` has them everywhere.
CHECKED = adversarial attention clip codebooks conditioners convolution decoding denoiser diffusion \
	discriminator dit first_stage guidance learned_variance mmdit models moments objectives optim \
	perceptual posterior prior_model quantizer rng samplers schedules steering t2i_adapter tasks \
	tiling tiny_autoencoder
CHECKED_TESTS = $(CHECKED:%=tests/test_%.py)
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
CHECKS = --jaxtyping-packages=latent_diffusion,beartype.beartype

# Where two workers share two cores, a thread of OpenBLAS would wait for a core while another one waits for
# the thread: a small eigenproblem takes a hundred times as long.
test types mutants: export OPENBLAS_NUM_THREADS = 1

test: $(VENV)/.test
	$(PYTEST) $(CHECKED_TESTS:%=--ignore=%)
	$(PYTEST) $(CHECKS) $(CHECKED_TESTS)

types: $(VENV)/.test
	$(PYTEST) $(CHECKS)

# Every test that a broken line has to make fail, with that line broken: tests/mutants.toml.
mutants: $(VENV)/.test
	PYTHONPATH=. $(BIN)/python tests/mutants.py

# Damaged and hostile files, more than in the suite; another seed: make fuzz FUZZ="--seed=1"
fuzz: $(VENV)/.test
	PYTHONPATH=.:tests $(BIN)/python tests/fuzz.py --count=20000 $(FUZZ) 2> /dev/null

# A run of one process and one of two, each killed 20 times at random moments: at most 40 minutes.
soak: $(VENV)/.test
	PYTHONPATH=. $(BIN)/python tests/soak.py
	PYTHONPATH=. $(BIN)/python tests/soak.py --processes=2 --minutes=25

# The server, asked by 16 clients that also cancel, leave and send nonsense; a minute.
crowd: $(VENV)/.test
	PYTHONPATH=.:tests $(BIN)/python tests/crowd.py

# The page in Chromium, with the model of a smoke run. CHROMIUM=PATH where it isn't Debian's.
browser: $(VENV)/.demo
	npm install --silent --prefix runs/browser playwright-core
	$(BIN)/python train.py --config=configs/openmoji_autoencoder.py:smoke --workdir=runs/browser/first_stage
	$(BIN)/python train.py --config=configs/openmoji_text.py:smoke --workdir=runs/browser/denoiser --config.first_stage.path=runs/browser/first_stage
	$(BIN)/python train.py --config=configs/openmoji_control.py:smoke --workdir=runs/browser/control --config.init_from=runs/browser/denoiser
	PYTHONPATH=. $(BIN)/python tests/browser.py runs/browser/denoiser runs/browser/control runs/browser/screenshots

# The site, into runs/site; a link that leads nowhere is an error.
docs: $(VENV)/.docs
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(VENV)/.lint $(VENV)/.core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch 2.13 is what the references were checked with; it is an oracle, never a dependency.
parity: $(VENV)/.test
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[parity]"
	$(BIN)/python -m pip install --quiet --no-deps k-diffusion  # only its samplers are used
	$(BIN)/python -m pip install --quiet --no-deps taming-transformers-rom1504  # only its GPT
	$(BIN)/python -m pytest tests/parity -o addopts="-q"

# Speed beside PyTorch's, into runs/bench. make bench BENCH="--device=gpu --only=unet_forward"
bench: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet torch==2.13.0 diffusers
	$(BIN)/python -m pip install --quiet --no-deps lpips  # which would bring a torchvision that nobody needs
	$(BIN)/python -m benchmarks $(BENCH)

# On a machine with a GPU or TPU: everything it can tell in 25 minutes, into runs/accelerator. JAX for it, and
# torch and diffusers for the other side, are installed before: see docs/benchmarks.md.
accelerator: $(VENV)/.core
	PYTHONPATH=. $(BIN)/python -m benchmarks.accelerator $(ACCELERATOR)

clean:
	rm -rf $(VENV) runs build *.egg-info
