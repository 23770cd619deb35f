# Everything a person or a machine types here is one of these.
#   make quickstart   install, train on the reviews that come with the project, evaluate, predict
#   make test         install what development needs, run the whole test suite
#   make hosts        one process against two machines and elastic ones, the largest differences shown; Linux, as root
#   make test-xla     the tests of XLA, by which TPUs compute, on its own CPU devices: 8 GB in .venv-xla
#   make soak         damage runs for an hour, and see that they go on

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test hosts test-xla soak lint format schema tables reviews clean

quickstart: .venv/.installed
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml -m accel_trainer.train recipes/quickstart.yaml \
	    --output_dir $(RUN) --resume
	@echo
	@$(BIN)/accel-trainer predict $(RUN) --text "Slow delivery, but the dumplings were worth the wait."
	@$(BIN)/accel-trainer predict $(RUN) --text "等了两个小时，面都坨了，再也不会点这家。"
	@echo
	@echo "the run is in $(RUN); start it over with: rm -r $(RUN)"

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

# Network namespaces are the machines.
hosts: .venv/.installed-dev
	$(BIN)/python -m pytest -q -rPs tests/distributed/test_two_hosts.py tests/distributed/test_elastic.py

# torch_xla wants a torch of its own version. The devices are processors, so that no TPU is needed.
test-xla: .venv-xla/.installed
	PJRT_DEVICE=CPU .venv-xla/bin/python -m pytest -q tests/xla

# An hour of damage: launches killed and resumed, processes that die at every file operation, recipes and tables fuzzed.
soak: .venv/.installed-dev
	PYTHONPATH=tests $(BIN)/python tests/faults/soak.py --output soak.json

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Files in the repository that a script writes.
schema: .venv/.installed-dev
	$(BIN)/python scripts/write_schema.py

tables: .venv/.installed-dev
	$(BIN)/python scripts/write_coming_from_trainer.py
	$(BIN)/python scripts/write_recipe_table.py
	$(BIN)/python scripts/write_recipe_reference.py

reviews: .venv/.installed-dev
	$(BIN)/python scripts/food_reviews.py

clean:
	rm -rf .venv .venv-xla runs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one: make quickstart PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -q -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(INSTALL) -q -e '.[dev]'
	@touch $@

.venv-xla/.installed: pyproject.toml constraints-xla.txt
	$(PYTHON) -m venv .venv-xla
	.venv-xla/bin/python -m pip install --disable-pip-version-check -q -c constraints-xla.txt -e . torch_xla hypothesis pytest
	@touch $@
