"""Every CPU instruction set that this machine has runs the tests marked `kernel`; the default one runs them in their own files."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import palm_kernels  # noqa: F401

if not hasattr(torch.ops.palm_kernels_cpu, "isas"):
    pytest.skip("the CPU library is not built", allow_module_level=True)
PAIRS = ("v4-bf16", "v4-dot", "v4-amx")  # the same library but for attention on bf16 and the peak
OTHERS = [i for i in torch.ops.palm_kernels_cpu.isas().split() if i != torch.ops.palm_kernels_cpu.isa()]


def run(isa, *command):
    env = {**os.environ, "PALM_KERNELS_CPU_ISA": isa}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("isa", OTHERS)
def test_variant(isa):
    here = pathlib.Path(__file__).parent
    files = [here]
    if {isa, torch.ops.palm_kernels_cpu.isa()} <= set(PAIRS):
        files = [*here.glob("test_attention*.py"), here / "test_parallel_block.py", here / "test_benchmarks.py"]
    done = run(isa, "-m", "pytest", *map(str, files), "-m", "kernel and not hypothesis", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    named = run(isa, "-c", "import torch, palm_kernels; print(torch.ops.palm_kernels_cpu.isa())")
    assert named.stdout.strip() == isa


def test_unknown_name():
    done = run("v9", "-c", "import torch, palm_kernels as pk; pk.swiglu(torch.ones(2), torch.ones(2))")
    assert "PALM_KERNELS_CPU_ISA=v9 is none of this machine's: v2" in done.stderr
