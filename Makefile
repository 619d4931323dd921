# make setup | test | lint | ner | bench | wheel. Each sets up .venv by itself where needed.
TORCH ?= torch==2.13.0
PY := .venv/bin/python

.PHONY: setup test lint ner bench wheel
setup: .venv/ready
.venv/ready: pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q "$(TORCH)" numpy
	$(PY) -m pip install -q "setuptools>=77" ninja wheel
	$(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@
test: setup
	OMP_WAIT_POLICY=passive $(PY) -m pytest tests -n 2
lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
ner: setup
	$(PY) -m examples.ner.train $(ARGS)
bench: setup
	$(PY) -m benchmarks.report $(ARGS)
wheel: setup
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .
