# make run: install and open the feed; make test: install and test. Needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test test-all lint types check bench docs report clean

run: $(STAMP)  ## the feed, at http://127.0.0.1:8000
	$(BIN)/broadsheet serve

# A process for each core (eight at most), each which takes over what another has left to do.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test: $(STAMP)  ## the fast tests
	$(PYTEST) -m "not slow"

test-all: $(STAMP)  ## all tests
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright

check: test lint types  ## what continuous integration runs

bench: $(STAMP)  ## speed and memory beside the peers; writes results/benchmarks.json and the tables in README and docs
	$(BIN)/python benchmarks/collect.py

docs: $(STAMP)  ## guides and API reference as pages, in build/site
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/build.py

report: $(STAMP)  ## claims and figures as one HTML file
	$(BIN)/broadsheet report

# torch comes first: packages that only ask for "some torch" then keep the pinned one. torchaudio (braindecode wants it)
# is compiled for CUDA; beside a CPU build of torch its compiled part cannot load, and without that part it runs on torch
# alone, which is all that braindecode uses: hence the last step, which does nothing where torchaudio imports.
$(STAMP): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -c "import torchaudio" 2>/dev/null || find $(VENV) -path '*/torchaudio/lib/*' -delete
	touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .benchmarks build dist
