# make demo: set up and run the main job. make test: set up and run the tests.
PLATFORM ?= cpu
RUN ?= cluster/runs/tiny-cpu.yaml
BIN := .venv/bin

.PHONY: setup demo test ci slow lint ui
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

ci: lint test

# Whole runs and interrupts on real parts, ten minutes and more.
slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu and not proof"

ui: setup
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db
