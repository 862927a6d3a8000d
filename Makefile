# make install | quick | test | test-gpu | lint | demo | demo ENGINE=jax | check-jax | soak. Python 3.11+ and make are all that must be there.
PYTHON ?= python3
BIN := .venv/bin

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[torch,jax,hub,tensorboard,dev]"
	touch $@

# Everything that needs neither PyTorch nor JAX; such a test that imports one fails.
quick: install
	$(BIN)/python -m pytest --quick --numprocesses 2

# The quick tests first, then all others: conftest.py chooses the order of the files, not xdist.
test: quick
	$(BIN)/python -m pytest -m "frameworks and not soak" --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Where there is a GPU: the laws that hold there, with their tolerances.
test-gpu: install
	$(BIN)/python -m pytest --cuda tests/test_cuda.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ENGINE ?= torch

demo: install
	$(BIN)/limner demo --engine $(ENGINE)

# The JAX engine where PyTorch, diffusers and transformers are not installed: the demo, and a picture.
check-jax:
	$(PYTHON) -m venv .venv-jax
	.venv-jax/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[jax]"
	.venv-jax/bin/python -c "import importlib.util as u; assert not any(u.find_spec(n) for n in ('torch', 'diffusers', 'transformers'))"
	.venv-jax/bin/limner demo --engine jax --output before-after-jax.png
	.venv-jax/bin/limner generate src/limner/bundled/model "an emoji of a red apple" --engine jax --scheduler ddim --output pictures-jax

soak: install
	$(BIN)/python -m pytest tests/test_resume.py --kills 100 -m "soak or not soak"
	$(BIN)/python -m pytest tests/test_kandinsky.py -k launcher -m soak
	CURVE_STEPS=100 $(BIN)/python -m pytest tests/test_jax*.py tests/test_flax.py tests/test_curve.py tests/test_guide.py -m "soak or not soak"
	$(BIN)/python -m pytest tests/test_gpu_check.py -m soak
	$(BIN)/python -m pytest tests/test_fuzz_settings.py tests/test_lost_process.py tests/test_exit_codes.py tests/test_export.py tests/test_same_picture.py tests/test_generate.py tests/test_changed_base.py tests/test_weight_files.py -m soak
	$(BIN)/python -m pytest tests/test_broken_bases.py -m soak
	$(BIN)/python -m pytest tests/test_fuzz.py tests/test_hostile.py -m soak --numprocesses 2

.PHONY: install quick test test-gpu lint demo check-jax soak
