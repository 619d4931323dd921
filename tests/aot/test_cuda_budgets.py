"""The CUDA library as it was built keeps its budgets; `make cuda-check` sees a kernel that breaks them."""

import re
import shutil
import subprocess

import cuda_check
import pytest
from compiler import ROOT, TOOLS

from palm_kernels import dispatch

LIBRARY = ROOT / "palm_kernels/_cuda.so"
needs_nvcc = pytest.mark.skipif(cuda_check.build.find_nvcc() is None, reason="no nvcc")
BROKEN = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(const float* x, float* y) {
  float kept[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < 64; ++j) y[(i * 64 + j) * 1024 + threadIdx.x] = kept[i] * kept[j];
}
template <class T, int N>
__global__ void swiglu_narrow(const T* x, T* y) { y[threadIdx.x] = x[threadIdx.x]; }
template __global__ void swiglu_narrow<float, 4>(const float*, float*);
"""


@pytest.mark.skipif(not LIBRARY.exists(), reason="_cuda.so is not built")
def test_nothing_spills_in_the_library():
    """Spills show as a stack. Every architecture and every op must be in it."""
    done = subprocess.run([TOOLS / "cuobjdump", "-res-usage", LIBRARY], capture_output=True, text=True, check=True)
    usage = re.findall(r"Function (\w+):\s*\n\s*REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    stems = {stem for op, kernels in dispatch.KERNELS.items() if op not in dispatch.CPU_ONLY for stem, _ in kernels}
    assert len(usage) > 250 and all(any(f"{stem}_" in name for name, *_ in usage) for stem in stems)
    assert [name for name, _, stack in usage if stack != "0"] == []


@needs_nvcc
@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_check_sees_spills_and_narrow_accesses(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text(BROKEN)
    kernels, warnings = cuda_check.compile_all([source], tmp_path / "build")
    said = "\n".join(broken for k in kernels for broken in k.broken_budgets())
    assert warnings == [] and {k.arch for k in kernels} == set(cuda_check.ARCHS)
    for arch in cuda_check.ARCHS:
        assert re.search(rf"^spills {arch}: \d+ bytes of spills", said, re.M), said
        assert re.search(rf"^spills {arch}: \d+ LDL and STL", said, re.M), said
        assert f"swiglu_narrow<float, 4> {arch}: no LDG.128, STG.128" in said
