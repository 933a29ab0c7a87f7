# Two commands on a fresh machine: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := data
RUN := runs/demo

.PHONY: demo test lint clean

# The demo needs little; tests also need the peers that results are compared with.
$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=…") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

# Builds phantoms, trains a tiny model on them and writes $(RUN)/index.html.
demo: $(VENV)/installed
	$(BIN)/python -m tfds_builders phantom --data_dir=$(DATA)
	$(BIN)/python -m rg_jax.train --config=configs/det.py:demo --workdir=$(RUN)

# Apache Beam does not go together with the protobuf of the rest (see setup.py).
$(VENV)-beam/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)-beam
	$(VENV)-beam/bin/pip install --quiet --disable-pip-version-check -e ".[data,codecs,beam]" pytest beartype
	touch $@

test: $(VENV)/installed-for-tests $(VENV)-beam/installed
	$(VENV)-beam/bin/python -m pytest -q tests/builders/test_beam.py
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf runs $(DATA) .pytest_cache
