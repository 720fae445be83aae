# make demo: set up and run the main job. make test: set up and run the tests.
PLATFORM ?= cpu
RUN ?= cluster/runs/tiny-cpu.yaml
BIN := .venv/bin

.PHONY: setup demo test ci slow gpu proof lint ui
setup:
	@bash requirements/install.sh $(PLATFORM)

demo: setup
	$(BIN)/h1r run $(RUN) --resume

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu and not proof"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Whole runs, failures and interrupts on real parts; takes the demo's models.
slow: demo
	$(BIN)/python -m pytest -m "slow and not gpu and not proof"

ci: lint test demo slow

# Tests that need a CUDA device, on a machine set up by `make setup PLATFORM=cuda`.
gpu: setup
	$(BIN)/python -m pytest -m gpu

# Long evidence, by hand: real engines under faults and scaling, three seeds and the controls,
# every defence of the rewards broken in turn, the benchmarks: some hours. Then README's tables.
# By themselves for what they need: bench_sandbox (nsjail), bench_rollouts_trl (TRL).
BENCHMARKS := main_job defences rewards_math learner loss_memory packing logprob_gap \
	$(addprefix rollouts_,async coordinator engine loop transfer)
proof: demo
	$(BIN)/python -m pytest -m "proof and not gpu"
	for name in $(BENCHMARKS); do $(BIN)/python tests/benchmarks/bench_$$name.py || exit 1; done
	$(BIN)/python tests/benchmarks/update_readme.py runs/tiny-cpu

ui: setup
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --workers 1
