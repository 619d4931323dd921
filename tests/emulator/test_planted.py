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
    "missing barrier in a sum over warps": Mistake(
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
    "missing barrier in a reduction": Mistake(
        "cross_entropy.cu",
        "shared[threadIdx.x / 32 * K + k] = x[k];\n  __syncthreads();",
        "shared[threadIdx.x / 32 * K + k] = x[k];",
        "cross_entropy",
        "test_cross_entropy.py::test_rows_of_more_than_64_kb",
        "not finite",
    ),
    "missing barrier before a buffer is filled again": Mistake(
        "attention_fwd.cu",
        "    __syncthreads();   // and all have done with the last V\n",
        "",
        "attention_fwd",
        "test_attention.py::test_matches_reference",
        "not finite",
        seed=1,
    ),
    "missing wait for a copy": Mistake(
        "attention_fwd.cu",
        "wait_copies<1>();  // V",
        "wait_copies<2>();  // V",
        "attention_fwd",
        "test_attention.py::test_matches_reference",
        "not finite",
    ),
    "wrong index in a fragment": Mistake(
        "attention.cuh",
        "(CHUNKS_FIRST ? high : low) * 8",
        "(CHUNKS_FIRST ? low : high) * 8",
        "attention_fwd",
        "test_attention.py::test_matches_reference",
        "over budget",
    ),
    "one key too many": Mistake(
        "attention.cuh",
        "int lo = 0, hi = s.S - 1;",
        "int lo = 0, hi = s.S;",
        "attention_fwd",
        "test_attention.py::test_matches_reference",
        "over budget",
    ),
    "too little shared memory": Mistake(
        "attention_keys.cu",
        "kListThreads / 32 * sizeof(int), queue",
        "kListThreads / 64 * sizeof(int), queue",
        "attention_keys",
        "test_attention.py -k bias",
        "behind its shared memory",
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
    command = (
        "-m",
        "pytest",
        *f"{TESTS}/{m.test}".split(),
        "-m",
        "kernel",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    )
    done = run(library, *command, seed=m.seed, **(emulator.preloaded() if m.sanitize else {}))
    output = done.stdout + done.stderr
    assert done.returncode and m.said in output, output[-4000:]
