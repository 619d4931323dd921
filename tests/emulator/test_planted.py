"""The emulator and the tests see mistakes: each class of them is planted into the kernels, and a test that passes without it fails."""

import pathlib
from typing import NamedTuple

import emulator
import pytest
from test_emulator import run

TESTS = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())


class Mistake(NamedTuple):
    file: str  # in csrc/cuda
    right: str  # stands there once
    wrong: str
    compiled: str  # the .cu that shows it
    test: str  # fails then
    said: str  # in the failure
    seed: int = 0
    sanitize: bool = False


MISTAKES = {
    "divergent barrier": Mistake(
        "swiglu.cu",
        "  if (at.row >= p.rows.count || n <= 0) return;\n  float g[N], u[N];\n",
        "  if (at.row >= p.rows.count || n <= 0) return;\n  __syncthreads();\n  float g[N], u[N];\n",
        "swiglu",
        "test_swiglu.py::test_strides",
        "deadlock in block",
    ),
    "missing barrier": Mistake(
        "norm.cuh",
        "  __syncthreads();\n#pragma unroll\n  for (int k = 0; k < K; ++k)\n    if (k < count) x[k] = warp_sum",
        "#pragma unroll\n  for (int k = 0; k < K; ++k)\n    if (k < count) x[k] = warp_sum",
        "norm_bwd",
        "test_norm.py::test_matches_reference",
        "not finite",
        seed=1,
    ),
    "a copy not waited for": Mistake(
        "norm_bwd.cu",
        "      wait_stages(plan.stages);",
        "      wait_stages(plan.stages + 1);",
        "norm_bwd",
        "test_norm.py::test_matches_reference",
        "not finite",
    ),
    "one tile too few": Mistake(
        "common.cuh",
        "(rows + high - 1) / high",
        "(rows + high - 1) / high - (rows > high)",
        "swiglu",
        "test_swiglu.py::test_matches_reference",
        "not finite",
    ),
    "written behind the end": Mistake(
        "common.cuh",
        "    if (i < n) p[i] = from_float<T>(x[i]);",
        "    if (i <= n) p[i] = from_float<T>(x[i]);",
        "swiglu",
        "test_swiglu.py::test_matches_reference",
        "heap-buffer-overflow",
        sanitize=True,
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_is_seen(name, tmp_path):
    m = MISTAKES[name]
    library = emulator.planted(tmp_path, m.file, m.right, m.wrong, m.compiled, sanitize=m.sanitize)
    command = "-m", "pytest", TESTS / m.test, "-m", "kernel", "-x", "-s", "-p", "no:cacheprovider", "-p", "no:xdist"
    done = run(library, *command, seed=m.seed, **(emulator.preloaded() if m.sanitize else {}))
    output = done.stdout + done.stderr
    assert done.returncode and m.said in output, output[-4000:]
