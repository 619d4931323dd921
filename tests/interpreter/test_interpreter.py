"""The tests marked `kernel` again, on the Triton kernels in Triton's interpreter: a process each, since it is chosen before import."""

import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy
import pytest

TESTS = pathlib.Path(__file__).parent.parent
FILES = [f for f in sorted(TESTS.glob("test_*.py")) if "mark.kernel" in f.read_text()]


def _why_not() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    old = tuple(int(x) for x in importlib.metadata.version("triton").split(".")[:2]) < (3, 7)
    new = tuple(int(x) for x in numpy.__version__.split(".")[:2]) >= (2, 4)
    return "triton 3.6's interpreter needs numpy < 2.4" if old and new else ""


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


def run(*command):
    env = {**os.environ, "TRITON_INTERPRET": "1", "PALM_KERNELS_BACKEND": "triton"}
    for name, value in (("HYPOTHESIS_PROFILE", "interpreter"), ("OMP_NUM_THREADS", "1"), ("OPENBLAS_NUM_THREADS", "1")):
        env.setdefault(name, value)
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_file(file):
    done = run("-m", "pytest", file, "-m", "kernel", "-p", "no:cacheprovider", "-p", "no:xdist")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
