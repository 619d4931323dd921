"""decode_linear: bound by reading the weight. A projection of PaLM 8B's width halved, and the head of a small model."""

from torch.nn.functional import linear

from .common import FORWARD, Bench, Work, cases, randn

SHAPES = cases("N F C", (1, 8192, 2048), (4, 8192, 2048), (1, 32000, 512), (4, 32000, 512))


def decode_linear(N, F, C, dtype):
    size = (F * C + N * (F + C)) * dtype.itemsize
    args = randn(N, C, dtype=dtype, grad=False), randn(F, C, dtype=dtype, grad=False)
    return args, {}, {FORWARD: Work(2 * N * F * C, size)}


BENCHES = [
    Bench("decode_linear", SHAPES, decode_linear, {"F.linear": linear}, quick=2, cold=True, bandwidth="read"),
]
