"""Every test starts from one seed, and memory from torch.empty is poisoned with NaN (also inside C++).

Hypothesis draws the same examples every time; `HYPOTHESIS_PROFILE=fuzz` draws new ones, ten times as many.
"""

import os

import pytest
import torch
from hypothesis import settings

torch.use_deterministic_algorithms(True, warn_only=True)
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("fuzz", derandomize=False, deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
