"""Nothing that runs for CUDA tensors waits for the device or reads from it, told from the source.

Forbidden are calls that copy data to the host or whose result's shape depends on data. Exempt is what only reports an error: a function or
an `if` block that ends in `raise`, or in a call of such a function. It runs once a kernel has returned a bad row, and CUDA's return None.
"""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[2] / "palm_kernels"
FILES = [*sorted((PACKAGE / "_triton").glob("*.py")), *sorted((PACKAGE / "ops").glob("*.py"))]
WAITS = {"cpu", "item", "masked_select", "nonzero", "numpy", "synchronize", "tolist", "unique"}
NUMBERS = {"bool", "float", "int"}  # of an element: int(x[i])


def reporters(tree: ast.AST) -> set[str]:
    """Functions that end in `raise`."""
    return {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and isinstance(f.body[-1], ast.Raise)}


def only_reports(node: ast.AST, reporting: set[str]) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name in reporting
    if not isinstance(node, ast.If):
        return False
    last = node.body[-1]
    call = last.value if isinstance(last, ast.Expr) else None
    called = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else None
    return isinstance(last, ast.Raise) or called in reporting


def waits(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute):
        return node.func.attr in WAITS
    return isinstance(node.func, ast.Name) and node.func.id in NUMBERS and isinstance(node.args[0], ast.Subscript)


def waiting_lines(source: str) -> list[str]:
    tree = ast.parse(source)
    reporting, found, left = reporters(tree), [], [tree]
    while left:
        node = left.pop()
        if only_reports(node, reporting):
            left += getattr(node, "orelse", [])
            continue
        if waits(node):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        left += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_call_waits_for_the_device(path):
    assert waiting_lines(path.read_text()) == []


def test_what_is_found_and_what_is_exempt():
    assert waiting_lines("def f(x):\n    return x.sum().item()") == ["2: x.sum().item()"]
    assert waiting_lines("if a:\n    f()\nelse:\n    torch.cuda.synchronize()") == ["4: torch.cuda.synchronize()"]
    assert waiting_lines("n = int(lengths[0])") == ["1: int(lengths[0])"]
    report = "def bad(x):\n    y = x.tolist()\n    raise ValueError(y)\n"
    assert waiting_lines(report) == [] and waiting_lines(report + "if row >= 0:\n    z = x.item()\n    bad(z)") == []
