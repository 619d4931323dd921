"""Every test starts from one seed, and memory from torch.empty is poisoned with NaN (also inside C++).

PALM_KERNELS_TEST_DEVICE=cuda puts every tensor there; with TRITON_INTERPRET=1 the interpreter is repaired first (interpreter/shims.py).
Hypothesis draws the same examples every time; `HYPOTHESIS_PROFILE=fuzz` draws new ones, ten times as many.
"""

import os

import pytest
import torch

try:
    from hypothesis import register_random, settings
except ImportError:  # as on a GPU machine with little installed: property tests are skipped, the others run
    import without_hypothesis

    without_hypothesis.install()
    register_random = settings = None

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import shims

    shims.install()
if device := os.environ.get("PALM_KERNELS_TEST_DEVICE"):
    torch.set_default_device(device)
torch.use_deterministic_algorithms(True, warn_only=True)


class TorchRandom:
    """torch's generator as hypothesis wants one: seeded before each example, so that a failing one fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis holds it weakly
if settings is not None:
    register_random(TORCH_RANDOM)
    settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
    settings.register_profile("fuzz", derandomize=False, deadline=None, max_examples=500)
    settings.register_profile("interpreter", derandomize=True, deadline=None, max_examples=8)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:  # left by a test of a command line
        torch.set_num_threads(threads)
