# make install | test | lint | demo. Python 3.11+ and make are all that must be there.
PYTHON ?= python3
BIN := .venv/bin

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[torch,jax,hub,tensorboard,dev]"
	touch $@

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: install
	$(BIN)/limner demo

soak: install
	LIMNER_KILLS=100 $(BIN)/python -m pytest tests/test_resume.py

.PHONY: install test lint demo soak
