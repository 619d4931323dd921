"""The tests marked `kernel` again, on the CUDA kernels in the emulator: a process a file and schedule.

Seed 0 steps all threads in turn; others let one warp run on until it must wait. Asynchronous copies land as late as they may (even
seeds) or at once (odd ones, whose chip is a Hopper). Under AddressSanitizer every access outside an allocation ends the process.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time

import emulator
import pytest

TESTS = pathlib.Path(__file__).parent.parent
FILES = [f for f in sorted(TESTS.glob("test_*.py")) if "mark.kernel" in f.read_text()]
pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())


OPTIONS = ("-m", "kernel", "-p", "no:cacheprovider", "-p", "no:xdist")


def run(library, *command, seed=0, **extra):
    env = {**os.environ, "PALM_KERNELS_CUDA_LIBRARY": str(library), "PALM_KERNELS_BACKEND": "cuda", **extra}
    env["PALM_EMULATOR_SEED"] = str(seed)
    env.setdefault("PALM_EMULATED_ARCH", "90" if seed % 2 else "80")
    for name, value in (("HYPOTHESIS_PROFILE", "interpreter"), ("OMP_NUM_THREADS", "1"), ("OPENBLAS_NUM_THREADS", "1")):
        env.setdefault(name, value)
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)


def pytest_of(library, file, **options):
    done = run(library, "-m", "pytest", file, *OPTIONS, **options)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="session")
def library():
    return emulator.default()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_file(library, file, seed):
    pytest_of(library, file, seed=seed)


LITTLE = """
import pytest, torch, palm_kernels as pk
from helpers import check_op, randn
def qkv(dtype):
    return [randn(2, n, heads, 256, dtype=dtype) for n, heads in ((70, 3), (90, 1), (90, 1))]
for dtype in (torch.bfloat16, torch.float16):
    check_op("attention", *qkv(dtype), causal=True, key_bias=randn(2, 90))
out = pk.attention(*qkv(torch.float32), causal=True)
with pytest.raises(RuntimeError, match="attention: backward in float32 at head dims over 128 needs more shared memory"):
    out.sum().backward()
"""


def test_chip_with_99_kb_of_shared_memory(library):
    """Head dim 256 has tiles of its own there, or says what would serve."""
    done = run(
        library, "-c", LITTLE, PALM_EMULATED_ARCH="86", PYTHONPATH=os.pathsep.join([str(TESTS), str(TESTS.parent)])
    )
    assert done.returncode == 0, done.stdout + done.stderr


COUNTED = """
import ctypes, sys, torch, palm_kernels as pk
counts = ctypes.CDLL(sys.argv[1]).palm_emulator_counts
for dtype in (torch.bfloat16, torch.float32):
    for D in (64, 128, 256):
        q, k, v = (torch.randn(1, 128, heads, D, dtype=dtype, requires_grad=True) for heads in (2, 1, 1))
        out = pk.attention(q, k, v)
        out.backward(torch.ones_like(out))
        got = (ctypes.c_long * 6)()
        counts(got)
        print(D, dtype.itemsize, *got[:3])
"""


def test_products_and_bank_conflicts(library):
    """No more and no fewer products than 2 forward and 7 backward (both passes make p and dp), no two rows of ldmatrix on a bank."""
    done = run(library, "-c", COUNTED, str(library))
    assert done.returncode == 0, done.stdout + done.stderr
    for line in done.stdout.splitlines():
        D, size, products, ldmatrix, conflicts = map(int, line.split())
        tile = 16 * 8 * (16 if size == 2 else 8)  # multiply-adds of an instruction
        times = 1 if size == 2 else 3  # float32 in three parts
        wanted = 256 * 128 * D // tile * times
        assert products == wanted * (2 + 7), (line, wanted)
        assert ldmatrix > 0 and conflicts == 0, line


def test_under_address_sanitizer():
    """The small calls of tests/cases.py: several tiles, ragged ends, masks, of every op. `main` runs everything so."""
    pytest_of(emulator.default(sanitize=True), TESTS / "test_gpu.py", seed=1, **emulator.preloaded())


def main() -> int:
    """Every file under every schedule, then under AddressSanitizer: what `make test` has no time for."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", default="0-4", help="first and last schedule (default: 0-4)")
    parser.add_argument("--sanitize", action="store_true", help="then seed 0 under AddressSanitizer")
    parser.add_argument("--only", default="", help="part of a file's name")
    options = parser.parse_args()
    first, _, last = options.seeds.partition("-")
    rounds = [(emulator.default(), seed, {}) for seed in range(int(first), int(last or first) + 1)]
    if options.sanitize:
        rounds.append((emulator.default(sanitize=True), 0, emulator.preloaded()))
    failures = 0
    for path, seed, extra in rounds:
        for file in [f for f in FILES if options.only in f.name]:
            start = time.monotonic()
            done = run(path, "-m", "pytest", file, *OPTIONS, seed=seed, **extra)
            failures += done.returncode != 0
            said = (
                done.stdout.strip().splitlines()[-1:]
                if done.returncode == 0
                else [done.stdout[-4000:], done.stderr[-2000:]]
            )
            how = f"seed {seed}{', sanitized' if extra else ''}"
            print(f"{file.name}, {how}: {time.monotonic() - start:.0f} s", *said, sep="\n  ", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
