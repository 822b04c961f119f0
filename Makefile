# Two commands do everything on a fresh machine with Python 3.11+, make and git:
#   make demo    sets up and runs the main job on real input
#   make test    sets up and runs the tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test check-all lint setup clean

demo: $(VENV)/.installed
	$(BIN)/ralm demo

test: $(VENV)/.installed-test
	$(BIN)/ruff check ralm tests benchmarks
	$(BIN)/python -m pytest -m "not slow"

check-all: $(VENV)/.installed-test
	$(BIN)/ruff check ralm tests benchmarks
	RALM_EXAMPLES=new $(BIN)/python -m pytest

setup: $(VENV)/.installed

# torch first and by itself: the range that pyproject names takes a CPU wheel where pip has one at hand
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

lint: $(VENV)/.installed-test
	$(BIN)/ruff check ralm tests benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
