# All targets use the environment in .venv, with the tested versions of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: help setup quickstart test test-full browser lab lint clean

help:
	@echo "make quickstart   install, then distil the embedded teacher; writes the executed notebook to runs/"
	@echo "make test         install, then run the tests"
	@echo "make test-full    all tests, among them every notebook and the assertions on time (an hour)"
	@echo "make browser      test the notebooks in JupyterLab (needs a Chromium); screenshots in runs/browser"
	@echo "make lab          install, then open JupyterLab on the notebooks"
	@echo "make lint         check the code with ruff, and that notebooks have no outputs"

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or later is needed. Name it: make PYTHON=...')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[test]"
	touch $@

quickstart: setup
	mkdir -p runs
	$(BIN)/papermill --cwd notebooks notebooks/00_quickstart.ipynb runs/00_quickstart.ipynb -p steps 240
	@echo "Executed notebook: runs/00_quickstart.ipynb (make lab opens JupyterLab)"

test: setup
	$(BIN)/python -m pytest

test-full: setup
	$(BIN)/python -m pytest -m "" --hypothesis-profile full

browser: setup
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[browser]"
	$(BIN)/python -m pytest -n 0 -m browser

lab: setup
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks # from here, where the notebooks find their figures

lint: setup
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --keep-id --verify notebooks/*.ipynb

clean:
	rm -rf .venv runs
