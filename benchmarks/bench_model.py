"""A whole model of 38.8 M parameters: the train step, bound by its GEMMs; the decode step and generate, bound by reading the weights."""

import torch

from .common import Bench, cases
from .models import cohere, palm, palm_pytorch, plan_decode, plan_train, under_compile

BUILDERS = {"PaLM-pytorch": palm_pytorch, "Cohere": cohere}
COMPILED = {f"torch.compile of {name}": under_compile(build) for name, build in BUILDERS.items()}
STATIC = cases("B past longest cache", (1, 128, 512, "static"))
DYNAMIC = cases("B past longest cache", (1, 128, 512, "dynamic"))

BENCHES = [
    Bench(
        "model_train",
        cases("B T", (4, 512), dtypes=[torch.float32]),
        None,
        {**BUILDERS, **COMPILED},
        quick=0,
        ours=palm,
        plan=plan_train,
    ),
    Bench(
        "model_decode",
        [*STATIC, *DYNAMIC],
        None,
        {"Cohere": cohere},
        bandwidth="read",
        ours=palm,
        plan=plan_decode,
    ),
]
