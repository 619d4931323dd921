"""The project's shape: every op in every role, imports one way, one signature for an op and its specification."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import palm_kernels as pk
from palm_kernels import dispatch, reference

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "palm_kernels"

# stem: (public names that the kernels serve, roles that it has beside contract, test and benchmark)
STEMS = {
    "attention": (("attention", "attention_varlen", "attention_decode"), ("cpu", "triton", "cuda")),
    "swiglu": (("swiglu", "swiglu_packed"), ("cpu", "triton", "cuda")),
    "rotary": (("rotary",), ("cpu", "triton", "cuda")),
    "norm": (("rms_norm", "layer_norm"), ("cpu", "triton", "cuda")),
    "cross_entropy": (("cross_entropy", "linear_cross_entropy"), ("cpu", "triton", "cuda")),
    "soft_weak_embedding": (("soft_weak_embedding",), ("cpu", "triton", "cuda")),
    "parallel_block": (("parallel_block",), ()),
    "decode_linear": (("decode_linear",), ("cpu",)),
}
PLAIN = {"merge_attention", "rotary_tables"}  # plain PyTorch, no specification beside them
PLANNED = set()  # roles and stems that a later issue fills
OPS = [op for stem, (ops, _) in STEMS.items() if stem not in PLANNED for op in ops]

MAY_IMPORT = {  # module: what it may import of the package (prefixes)
    "checks": (),
    "dispatch": ("reference", "_triton", "__version__"),
    "reference": (),
    "gemm": (),
    "ops": ("ops", "dispatch", "checks", "gemm"),
    "nn": ("ops",),
    "models": ("models", "nn", "ops"),
    "train": ("train", "models", "nn", "ops"),
    "paths": ("paths", "models", "nn", "ops"),
    "integrations": ("integrations", "models", "nn", "ops"),
}
OWN_OPS = {
    "attention",
    "decode_linear",
    "norm",
    "rotary",
    "swiglu",
}  # the stems that parallel_block may take raw helpers from


def package_imports(path: pathlib.Path) -> set[str]:
    """Names of the package's modules that a file imports, relative to the package."""
    here = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            names = [node.module] if node.module else [a.name for a in node.names]
            found |= {"/".join((*base, name.replace(".", "/"))) for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("palm_kernels"):
            found.add(node.module.removeprefix("palm_kernels").strip(".").replace(".", "/") or "__init__")
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("palm_kernels")]
            found |= {n.removeprefix("palm_kernels").strip(".").replace(".", "/") or "__init__" for n in names}
    return found


@pytest.mark.parametrize("stem", [s for s in STEMS if s not in PLANNED])
def test_stem_is_whole(stem):
    files = [f"palm_kernels/ops/{stem}.py", f"tests/test_{stem}.py", f"benchmarks/bench_{stem}.py"]
    paths = {
        "cpu": f"csrc/cpu/{stem}.cpp",
        "triton": f"palm_kernels/_triton/{stem}.py",
        "cuda": f"csrc/cuda/{stem}*.cu",
    }
    files += [paths[role] for role in STEMS[stem][1] if role not in PLANNED]
    assert [f for f in files if not list(ROOT.glob(f))] == []


def test_no_stem_is_unknown():
    """Whatever stands in a role's folder belongs to a stem of the table."""
    for pattern in (
        "palm_kernels/ops/*.py",
        "palm_kernels/_triton/*.py",
        "csrc/cpu/*.cpp",
        "csrc/cuda/*.cu",
        "benchmarks/bench_*.py",
    ):
        for path in ROOT.glob(pattern):
            name = path.stem.removeprefix("bench_")
            if name not in ("__init__", "bindings", "memory", "peak", "common", "model"):
                assert any(name == s or name.startswith(f"{s}_") for s in STEMS), path


@pytest.mark.parametrize("op", OPS)
def test_signature_is_the_specifications(op):
    def shape(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert shape(getattr(pk, op)) == shape(getattr(reference, op))


def test_public_names():
    modules = {"backend", "info", "release_memory"}
    assert set(pk.__all__) == {*OPS, *PLAIN, *modules} and all(getattr(pk, n).__doc__ for n in pk.__all__)
    assert set(dispatch.KERNELS) == set(OPS)


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if module in MAY_IMPORT:
            for target in package_imports(path):
                first = target.split("/")[0]
                assert first in MAY_IMPORT[module], f"{path.relative_to(ROOT)} imports {target}"
        if module == "ops":
            others = {t.split("/")[1] for t in package_imports(path) if t.startswith("ops/")}
            assert others <= (OWN_OPS if path.stem == "parallel_block" else set()), path


def test_native_includes_go_one_way():
    """Bindings alone see torch and bindings.h; kernels see ops.h, scalar.h and their own folder; cpu and cuda never meet."""
    for path in (ROOT / "csrc").rglob("*.*"):
        text, bindings = path.read_text(), path.stem == "bindings"
        own = re.findall(r'#include "([^"]+)', text)
        torch = [i for i in re.findall(r"#include [\"<]([^\">]+)", text) if i.startswith(("torch/", "ATen/", "c10/"))]
        allowed = {"../ops.h", "../bindings.h"} if bindings else {"../ops.h", "../scalar.h"}
        assert bindings or not torch, f"{path}: {torch}"
        assert [i for i in own if "/" in i and i not in allowed] == [], path


def test_import_is_light():
    program = (
        "import sys, palm_kernels; print([m for m in ('triton', 'transformers', 'numpy.testing') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "triton" not in done.stdout and "transformers" not in done.stdout


def test_info_names_every_op():
    done = subprocess.run([sys.executable, "-m", "palm_kernels"], capture_output=True, text=True, check=True)
    for op in OPS:
        assert re.search(rf"^{op} +fp32 bf16 fp16 fp64 ", done.stdout, re.M), done.stdout
    assert f"palm_kernels {pk.__version__}" in done.stdout and "instruction set" in done.stdout
