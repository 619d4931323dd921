"""Nothing that runs for CUDA tensors waits for the device or reads from it: told from the source, and by running it without data.

Forbidden are calls that copy data to the host or whose result's shape depends on data. Exempt is
- what only reports an error: a function or an `if` block that ends in `raise`, or in a call of such a function. It runs once a kernel has
  returned a bad row, and CUDA's return None;
- what runs for CPU tensors: the branch taken where a device's type == "cpu", and functions that are named in such branches alone.
"""

import ast
import contextlib
import importlib
import os
import pathlib

import pytest
import torch

PACKAGE = pathlib.Path(__file__).parents[2] / "palm_kernels"
FILES = [*sorted((PACKAGE / "_triton").glob("*.py")), *sorted((PACKAGE / "ops").glob("*.py"))]
WAITS = {"cpu", "item", "masked_select", "nonzero", "numpy", "synchronize", "tolist", "unique"}
NUMBERS = {"bool", "float", "int"}  # of an element: int(x[i])


def on_cpu(node: ast.AST) -> list[ast.AST]:
    """What a branch runs for CPU tensors."""
    if not isinstance(node, ast.If | ast.IfExp) or not ast.unparse(node.test).endswith(".type == 'cpu'"):
        return []
    return node.body if isinstance(node, ast.If) else [node.body]


def names(nodes) -> set[str]:
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)}


def exempt_functions(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Functions that end in `raise`, and functions that are named where only CPU tensors come."""
    functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)]
    branches = [n for node in ast.walk(tree) for n in on_cpu(node)]
    inside = {id(n) for branch in branches for n in ast.walk(branch)}
    elsewhere = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in inside}
    return {f.name for f in functions if isinstance(f.body[-1], ast.Raise)}, names(branches) - elsewhere


def only_reports(block: list[ast.stmt], reporting: set[str]) -> bool:
    last = block[-1]
    return isinstance(last, ast.Raise) or (
        isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and bool(names([last.value.func]) & reporting)
    )


def waits(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute):
        return node.func.attr in WAITS
    return isinstance(node.func, ast.Name) and node.func.id in NUMBERS and isinstance(node.args[0], ast.Subscript)


def waiting_calls(source: str) -> list[str]:
    tree = ast.parse(source)
    reporting, cpu_only = exempt_functions(tree)
    found, left = [], [tree]
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef) and node.name in reporting | cpu_only:
            continue
        skipped = on_cpu(node)
        if isinstance(node, ast.If) and only_reports(node.body, reporting):
            skipped = node.body
        if waits(node):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        left += [child for child in ast.iter_child_nodes(node) if child not in skipped]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_call_waits_for_the_device(path):
    assert waiting_calls(path.read_text()) == []


def test_what_is_found_and_what_is_exempt():
    assert waiting_calls("def f(x):\n    return x.sum().item()") == ["2: x.sum().item()"]
    assert waiting_calls("if a:\n    f()\nelse:\n    torch.cuda.synchronize()") == ["4: torch.cuda.synchronize()"]
    assert waiting_calls("n = int(lengths[0])") == ["1: int(lengths[0])"]
    report = "def bad(x):\n    y = x.tolist()\n    raise ValueError(y)\n"
    assert waiting_calls(report) == [] and waiting_calls(report + "if row >= 0:\n    z = x.item()\n    bad(z)") == []
    host = "def by_data(x):\n    return x.nonzero()\n"
    choice = "f = by_data if x.device.type == 'cpu' else by_shape\n"
    assert waiting_calls(host + choice) == [] and waiting_calls(host + choice + "by_data(y)") == ["2: x.nonzero()"]


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreting process cannot stand in for a GPU"
)
def test_composed_ops_run_without_data(monkeypatch):
    """The bodies that call several kernels and torch's products, on tensors that hold no data: reading one raises."""
    from compiler import count_launches
    from launches import INT64, new

    losses, block = (
        importlib.import_module(f"palm_kernels.ops.{stem}") for stem in ("cross_entropy", "parallel_block")
    )
    for module in (losses, block):
        monkeypatch.setattr(module, "select", lambda stem, name, *_: launcher(stem, name))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know "meta"
    hidden, weight, target = new(4, 64, 128), new(512, 128), new(4, 64, dtype=INT64)
    for max_kept in (None, 100):
        options = (-100, 0.1, 1e-4, 1.0, "mean", max_kept, True, True, True)
        args = (hidden, weight, new(512), target, None, None, None, *options)
        assert count_launches(90, losses._linear_body, *args)
    H, D, F, C = 4, 32, 256, 128
    tensors = (new(4, 64, C), new(C), new((H + 2) * D + 2 * F, C), new(C, H * D + F), new(64, 16), new(64, 16))
    inputs, options = (*tensors, None, new(4, 64), None), (H, 1, D, "rms_norm", 1e-6, 1.0, True, -1, -1, False)
    assert count_launches(90, block._fwd_body, *inputs, *options, True)
    saved = block._fwd_outputs(*inputs, *options, True)
    assert count_launches(90, block._bwd_body, saved[0], *inputs, *saved[1:], *options, (True,) * 5)


def launcher(stem: str, name: str):
    return getattr(importlib.import_module(f"palm_kernels._triton.{stem}"), name)
