"""Every test starts from one seed, and memory from torch.empty is poisoned with NaN (also inside C++)."""

import pytest
import torch

torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
