# Each target sets up .venv and builds the kernels by itself where needed; ARGS passes options on.
TORCH ?= torch==2.13.0
PY := .venv/bin/python
TRITON ?=
GPU_PY ?= $(or $(wildcard $(PY)),python3)
NATIVE := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
FORMATTED := $(NATIVE) $(wildcard tests/emulator/*.h tests/emulator/*.cu)

PARITY := PaLM-pytorch-0.2.2 palm-rlhf-pytorch-0.2.3 palm-rlhf-pytorch-0.8.0

.PHONY: help setup build test lint format parity hf-tests triton-check cuda-check gpu-check ner pretrain bench report wheel clean
help:
	@echo "make setup    .venv with $(TORCH), all extras, the kernels built in place"
	@echo "make build    the kernels alone, after a change in csrc (ninja, incremental)"
	@echo "make test     every test;  ARGS='tests/test_swiglu.py -k stride' for some"
	@echo "make parity   other PaLMs of PyPI in build/parity, for tests/test_parity.py: $(PARITY)"
	@echo "make hf-tests TRANSFORMERS=CHECKOUT  transformers' own tests of a model on ours, from a checkout of the installed version"
	@echo "make lint     ruff, clang-format, pyright;  make format writes"
	@echo "make gpu-check PART=tests|sanitize|speed  on a GPU, with GPU_PY as it is (.venv's python, else python3); all parts by default"
	@echo "make triton-check  every Triton kernel compiled for sm_80 and sm_90, a table;  TRITON=3.6.0 in an environment of its own"
	@echo "make cuda-check    every CUDA kernel compiled for sm_80 and sm_90a, a table;  ARGS='--only attention'"
	@echo "make ner      the example: fine-tune on named entities;  ARGS='--data DIR', INIT=DIR to start from a pre-trained one"
	@echo "make pretrain the example: a small model from text files, or from the prose that Python carries;  ARGS='--objective weak'"
	@echo "make report   benchmarks.report: ours and all peers, tables and pictures;  ARGS='--quick'"
	@echo "make bench    pytest-benchmark on our kernels, kept in .benchmarks;  ARGS='--benchmark-compare' holds it against the last"
	@echo "make wheel    dist/*.whl, tested from an empty directory"

setup: .venv/ready build
.venv/ready: pyproject.toml
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q "$(TORCH)" numpy "setuptools>=77" ninja wheel setuptools_scm  # seqeval's sdist asks for the last
	$(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@
build: palm_kernels/_cpu.so
palm_kernels/_cpu.so: $(NATIVE) setup.py | .venv/ready
	$(PY) setup.py -q build_ext --inplace
	@test ! -e $@ || touch $@
test: setup
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist worksteal $(ARGS)
parity: $(PARITY:%=build/parity/%/ready)
build/parity/%/ready: | .venv/ready
	stem=$*; $(PY) -m pip install -q --no-deps --target $(@D) "$${stem%-*}==$${stem##*-}" beartype einops
	touch $@
hf-tests: setup build/hf-tests/ready
	@test -f "$(TRANSFORMERS)/tests/test_modeling_common.py" || { echo "TRANSFORMERS='$(TRANSFORMERS)' is no checkout of transformers"; exit 2; }
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive PYTHONPATH=.:$(TRANSFORMERS):build/hf-tests \
	  $(PY) -m pytest -c tests/hf/pytest.ini -n 2 --dist worksteal tests/hf $(ARGS)
build/hf-tests/ready: | .venv/ready
	$(PY) -m pip install -q --target $(@D) parameterized httpx
	touch $@
lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/clang-format --dry-run --Werror $(FORMATTED)
	.venv/bin/pyright
format: setup
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
	.venv/bin/clang-format -i $(FORMATTED)
gpu-check:
	$(GPU_PY) -m benchmarks.gpu_check $(PART) $(ARGS)
triton-check: setup $(TRITON:%=build/triton-%/ready)
	PYTHONPATH=. TRITON=$(TRITON) $(or $(TRITON:%=build/triton-%/bin/python),$(PY)) tests/aot/check.py $(ARGS)
	$(if $(TRITON),build/triton-$(TRITON)/bin/python -m pytest -n 2 tests/interpreter)
cuda-check: setup
	PYTHONPATH=. $(PY) tests/aot/cuda_check.py $(ARGS)
build/triton-%/ready: | .venv/ready
	$(PY) -m venv $(@D)
	$(@D)/bin/python -m pip install -q "triton==$*" "numpy<2.4"
	for site in $(@D)/lib/python*/site-packages; do ls -d $(CURDIR)/.venv/lib/python*/site-packages > $$site/venv.pth; done
	touch $@
ner: setup
	$(PY) -m examples.ner.train $(INIT:%=--model %) $(ARGS)
pretrain: setup
	$(PY) -m examples.pretrain.pretrain $(ARGS)
report: setup
	$(PY) -m benchmarks.report $(ARGS)
bench: setup
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-autosave -k palm $(ARGS)
wheel: setup
	rm -rf dist
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .
	rm -rf build/wheel && mkdir -p build/wheel
	$(PY) -m pip install -q --no-deps --target build/wheel/site dist/*.whl
	cd build/wheel && PYTHONPATH=site ../../$(PY) -c "import torch, palm_kernels as pk; assert 'wheel/site' in pk.__file__; \
	  x = torch.randn(4, 8); assert torch.allclose(pk.swiglu(x, x), torch.nn.functional.silu(x) * x); pk.info()"
clean:
	rm -rf build dist palm_kernels/*.so
