# `make check` is what CI runs; every target works from a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_VENV := .venv-demo
DEMO_IMAGE ?= examples/night_stand.png
# Folder of GLB, OBJ or PLY files for `make bench`.
OBJECTS ?= objects
DEMO_MESH ?= out/$(basename $(notdir $(DEMO_IMAGE))).glb

.PHONY: check lint types imports test test-gpu bench demo clean

check: lint types imports test

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

imports: $(VENV)/ready
	$(BIN)/lint-imports

# A file's tests stay together: they share what is costly to make.  In order: else the few slow ones end alone.
test: $(VENV)/ready
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

# Needs a CUDA device; the first failure names what is missing.
test-gpu: $(VENV)/ready
	$(BIN)/pytest -m gpu

bench: $(VENV)/ready
	$(BIN)/python benchmarks/fit.py --objects $(OBJECTS) --limit 50

# A newcomer's road: plain install, one picture, one mesh.
demo: $(DEMO_VENV)/ready
	mkdir -p $(dir $(DEMO_MESH))
	$(DEMO_VENV)/bin/uc3d-rt $(DEMO_IMAGE) -o $(DEMO_MESH)

# torch is pinned and comes first, so that the extras find it and choose no other build.
$(VENV)/ready: pyproject.toml hatch_build.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,export,engines,dev]'
	touch $@

$(DEMO_VENV)/ready: pyproject.toml hatch_build.py $(wildcard runtime/uc3d_rt/*.py runtime/uc3d_rt/*/*.py engines/edge/*)
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check .
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
