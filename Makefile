# Everything runs in a virtual environment of its own, made on first use from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers

.PHONY: demo serve test soak fuzz lint format bench clean
.DELETE_ON_ERROR:

demo: $(READY)  ## serve the bundled model, send it a burst, lay out what came
	@$(BIN)/stepbatch demo

serve: $(READY)  ## serve the bundled model until interrupted
	@$(BIN)/stepbatch serve

test: $(READY)
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

soak: $(READY)  ## the promises of docs/reliability.md in their long forms, an hour; writes its table
	@$(BIN)/python -m pytest --soak tests/reliability

fuzz: $(READY)  ## what reads sizes, fields, forms and files, by coverage, ten minutes; writes its row there
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	@$(BIN)/python tests/reliability/fuzz_parsers.py --seconds 600 --soak

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(PEERS)  ## beside servers that one would write today, a quarter of an hour; writes docs/benchmarks.md
	@$(BIN)/python benchmarks/serving.py

clean:
	rm -rf $(VENV) demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Where pip has no index of CPU wheels configured, this takes the CUDA build of torch, which runs without a GPU too.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "stepbatch needs Python 3.11 or later; name one: make PYTHON=python3.11 ...")'
	@echo "installing into $(VENV), a minute or two the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,dev]'
	@touch $@

$(PEERS): $(READY)
	@echo "installing LitServe and Ray Serve into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,dev,peers]'
	@touch $@
