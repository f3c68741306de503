# The commands of the README, and what contributors run. Each sets up what it needs and reuses what is there.
#   make quickstart   environment, embedded corpus, a small BERT by random paths, its evaluation, a plot,
#                     and what the model fills in
#   make compare      the same BERT by random paths and trained the standard way, at equal FLOPs, and a plot of both
#   make test         environment, system packages, make check, all tests
#   make test-gpu     environment, the tests that need a GPU (tests/gpu/README.md)
#
# PYTHON=python3.12 chooses the interpreter (3.11 or 3.12), VENV=FOLDER the environment, TEST_WORKERS=N how many tests
# run at a time.

VENV ?= .venv
RUN ?= bert_quickstart
PROCESSES ?= 2
DATA ?= data/docs
VOCAB_SIZE ?= 1024
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
SOAK_ARGS ?=
OLDEST_TESTS ?= $(addprefix tests/unit/,model/test_compile.py model/test_block_on_hopper.py \
	model/test_kernels_on_hopper.py parallel/test_dropout.py)

export PYTHON
# A command inside the environment, as if it were activated.
inside = PATH="$(abspath $(VENV))/bin:$$PATH"
# Processes that train on one CPU share its cores; left alone, each would take all of them.
threads = $$(n=$$(($$(getconf _NPROCESSORS_ONLN) / $(PROCESSES))); echo $$((n > 0 ? n : 1)))

.DEFAULT_GOAL := help
.PHONY: help quickstart compare test test-gpu test-oldest-torch soak soak-layouts check format environment environment-dev system-packages hooks clean

help:
	@sed -n 's/^# \{0,1\}//;1,9p' Makefile

quickstart: environment data
	$(inside) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(threads)} deepspeed --num_accelerators $(PROCESSES) \
		raptr_ds/pretrain.py --deepspeed_config deepspeed_configs/$(RUN).json
	$(inside) python tools/plot_run.py runs/$(RUN)
	$(inside) python tools/show_run.py runs/$(RUN)

compare: environment data
	$(inside) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(threads)} python tools/experiment.py experiments/quickstart_twins.json
	$(inside) python tools/plot_run.py runs/quickstart_twins/runs/standard/seed-1 runs/quickstart_twins/runs/raptr/seed-1 \
		--output runs/quickstart_twins/comparison.png

.PHONY: data
data: environment
	$(inside) python tools/prepare_data.py --embedded --vocab-size $(VOCAB_SIZE) --output $(DATA)

# The tests start some hundred processes: compiled before, each saves half a second, whatever the environment says.
test: environment-dev system-packages check
	$(inside) python -m compileall -q raptr_ds tests tools
	$(inside) OMP_NUM_THREADS=1 python -m pytest --numprocesses $(TEST_WORKERS) $(PYTEST_ARGS)

# Where torch sees no GPU each is skipped and says so.
test-gpu: environment-dev
	$(inside) KIT_DEVICE=cuda python -m pytest tests/gpu $(PYTEST_ARGS)

# By hand: hours of faults at random, and whether the run comes out as the one that nobody disturbed (tests/soak);
# SOAK_ARGS=--slurm on a Slurm of three logical nodes.
soak: environment-dev data
	$(inside) python -m tests.soak --data $(DATA) $(SOAK_ARGS)

# By hand too: run files at random, each in layouts at random, and whether they come to what one process comes to.
soak-layouts: environment-dev data
	$(inside) python -m tests.soak.layouts --data $(DATA) $(SOAK_ARGS)

# What torch compiles, on the oldest torch that is supported: an environment of its own, of some 5 GB.
test-oldest-torch:
	@tools/make_environment.sh $(VENV)-oldest requirements-oldest.txt
	OMP_NUM_THREADS=1 $(abspath $(VENV)-oldest)/bin/python -m pytest $(OLDEST_TESTS)

# Exactly what continuous integration runs before the tests.
check: environment-dev
	$(inside) ruff check .
	$(inside) ruff format --check .
	$(inside) lint-imports
	$(inside) pyright

format: environment-dev
	$(inside) ruff check --fix .
	$(inside) ruff format .

environment:
	@tools/make_environment.sh $(VENV) requirements.txt

environment-dev:
	@tools/make_environment.sh $(VENV) requirements-dev.txt

# Slurm, MPI, a browser: tests that need what cannot be installed here say so and are skipped.
system-packages:
	@tools/install_system_packages.sh || echo "system packages are missing: the tests that need them will be skipped"

# Run `make check`'s fast parts before every commit.
hooks: environment-dev
	$(inside) pre-commit install

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache build
