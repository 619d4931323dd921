"""The tests marked `kernel` again, on the CUDA kernels in the emulator: a process a file and schedule.

Seed 0 steps all threads in turn; others let one warp run on until it must wait. Asynchronous copies land as late as they may (even
seeds) or at once (odd ones). Under AddressSanitizer every access outside an allocation ends the process.
"""

import os
import pathlib
import subprocess
import sys

import emulator
import pytest

TESTS = pathlib.Path(__file__).parent.parent
FILES = [f for f in sorted(TESTS.glob("test_*.py")) if "mark.kernel" in f.read_text()]
pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())


def run(library, *command, seed=0, **extra):
    env = {**os.environ, "PALM_KERNELS_CUDA_LIBRARY": str(library), "PALM_KERNELS_BACKEND": "cuda", **extra}
    env["PALM_EMULATOR_SEED"] = str(seed)
    for name, value in (("HYPOTHESIS_PROFILE", "interpreter"), ("OMP_NUM_THREADS", "1"), ("OPENBLAS_NUM_THREADS", "1")):
        env.setdefault(name, value)
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)


def pytest_of(library, file, **options):
    done = run(library, "-m", "pytest", file, "-m", "kernel", "-p", "no:cacheprovider", "-p", "no:xdist", **options)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="session")
def library():
    return emulator.default()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_file(library, file, seed):
    pytest_of(library, file, seed=seed)
