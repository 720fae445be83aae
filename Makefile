# make demo: set up and run the main job. make test: set up and run the tests.
PLATFORM ?= cpu
RUN ?= cluster/runs/tiny-cpu.yaml
BIN := .venv/bin

.PHONY: setup demo test ci slow proof lint ui
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

# Long evidence, by hand: real engines under faults and scaling, then three seeds and the controls
# (most of an hour each), then README's tables.
proof: demo
	$(BIN)/python -m pytest -m "proof and not gpu"
	$(BIN)/python tests/benchmarks/bench_main_job.py
	$(BIN)/python tests/benchmarks/update_readme.py runs/tiny-cpu

ui: setup
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --workers 1
