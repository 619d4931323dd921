"""What the kernels are to reach on a CPU, as ratios to peers and to peaks of the same run.

How fast bfloat16 can be depends on the machine: targets follow its peaks, not its name.
"""

import itertools
from collections.abc import Callable

from .common import BOTH, FORWARD, GIVEN
from .machine import arithmetic
from .tables import doublings, ours_of
from .targets import Target, each, key, percent, ratio, share, speedup

FP32, BF16 = ({"dtype": name} for name in ("float32", "bfloat16"))
PLAIN = {"variant": ""}
MODES, DIMS = (FORWARD, BOTH), (64, 128, 256)
# attention over SDPA, by mode and head dim
SINGLE, HALF, NONE = ((1.8, 1.4, 1.5),) * 2, ((1.6,) * 3,) * 2, ((None,) * 3,) * 2
SLOW = (2.8, 2.4, 2.7), (3.0, 2.5, 2.7)
FAST, FAST_GOALS = ((2.4, 1.9, 2.1), (2.0, 1.6, 1.7)), ((3.2, 2.6, 2.9), (2.8, 2.1, 2.2))
TILES, TILES_GOALS = ((1.8, 2.0, 1.8), (3.5, 3.0, 2.4)), ((2.4, 2.6, 2.4), (4.5, 4.0, 3.0))  # SDPA has them too
OVER_SDPA = {  # by kind of machine and dtype: floors, goals
    "slow dot": {"float32": (SINGLE, NONE), "bfloat16": (SLOW, NONE), "float16": (SLOW, NONE)},
    "fast dot": {"float32": (SINGLE, NONE), "bfloat16": (FAST, FAST_GOALS), "float16": (HALF, NONE)},
    "tile unit": {"float32": (SINGLE, NONE), "bfloat16": (TILES, TILES_GOALS), "float16": (HALF, NONE)},
}


def machine_kind(peaks: dict) -> str:
    """Whether bfloat16 products are no faster than float32's ("slow dot"), about twice ("fast dot"), or far more ("tile unit")."""
    gain = arithmetic(peaks, "bf16") / arithmetic(peaks, "fp32")
    return "tile unit" if gain >= 3 else "fast dot" if gain >= 1.3 else "slow dot"


def _attention(kind: str) -> list[Target]:
    found = []
    for mode, D in itertools.product(MODES, DIMS):
        m, i, case = MODES.index(mode), DIMS.index(D), {"D": D, "causal": True, **PLAIN}
        for dtype, (floors, goals) in OVER_SDPA[kind].items():
            value = each("attention", mode, speedup("SDPA"), dtype=dtype, **case)
            found.append(Target(f"attention D={D} {mode} {dtype}, SDPA", "x", floors[m][i], goals[m][i], value))
        value = each("attention", mode, percent, **FP32, **case)
        found.append(Target(f"attention D={D} {mode} float32, of the peak", "%", 78, 85, value))
    full = each("attention", FORWARD, speedup("SDPA"), causal=False, **FP32)
    found.append(Target("attention not causal float32 forward, SDPA", "x", 1.25, None, full))
    for mode in MODES:
        odd = each("attention", mode, speedup("SDPA"), variant="odd sizes")
        found.append(Target(f"attention D 80, 96, H 71, GQA, T 1000 {mode}, SDPA", "x", 1.3, None, odd))
    return found


def _packed() -> list[Target]:
    def excess(row, r):
        """The time over the padded batch's, over the pairs kept of the padded batch's."""
        lengths = row["case"]["lengths"]
        kept = sum(n * n for n in lengths) / (len(lengths) * max(lengths) ** 2)
        return r["over_floors"] / kept if "over_floors" in r else None

    name = "attention_varlen {}: time over padded, over pairs kept"
    return [Target(name.format(m), "x", 1.1, None, each("attention_varlen", m, excess, max), low=True) for m in MODES]


def _decode() -> list[Target]:
    found = []
    for dtype, sdpa, pair, goal in (("float32", 4.5, 2.0, 0.34), ("bfloat16", 3.5, 1.6, 0.28)):
        case = {"B": 1, "S": 4096, "D": 256, "dtype": dtype, **PLAIN}
        name = f"attention_decode S=4096 D=256 {dtype}"
        found += [
            Target(f"{name}, SDPA", "x", sdpa, None, each("attention_decode", FORWARD, speedup("SDPA"), **case)),
            Target(
                f"{name}, matmul pair", "x", pair, None, each("attention_decode", FORWARD, speedup("matmul"), **case)
            ),
            Target(
                f"{name}, time", "ms", None, goal, each("attention_decode", FORWARD, key("ms"), max, **case), low=True
            ),
        ]
    return found


def _memory_bound() -> list[Target]:
    shapes = {"swiglu": {"N": 2048}, "rms_norm": {"N": 4096}, "rotary": {}, "cross_entropy": {}, "layer_norm": {}}
    floors = {"cross_entropy": (1.5, 1.1), "layer_norm": (1.0, 1.0)}
    found = []
    for op, shape in shapes.items():
        case = {**shape, **FP32, **PLAIN}
        for peer, floor in zip(("eager", "torch.compile"), floors.get(op, (2.0, 1.1)), strict=True):
            found.append(Target(f"{op} {BOTH} fp32, {peer}", "x", floor, None, each(op, BOTH, speedup(peer), **case)))
        given = [each(op, mode + GIVEN, percent, **case) for mode in MODES]
        lowest = lambda rows, given=given: min((v for g in given if (v := g(rows)) is not None), default=None)  # noqa: E731
        found.append(Target(f"{op}{GIVEN}, of copy bandwidth", "%", 80, None, lowest))
    return found


def _gradients(row: dict) -> float:
    """MiB of dhidden and dweight."""
    N, C, V = (row["case"][x] for x in "NCV")
    return 4 * C * (N + V) / 2**20


def _composed() -> list[Target]:
    large, linear, block = {"V": 256000, "ignored": 0.0}, "linear_cross_entropy", "parallel_block"
    memory = each(linear, BOTH, share("memory_mib", "eager", _gradients), max, **large)
    times = [each(linear, BOTH, key("ms"), max, V=256000, ignored=share_) for share_ in (0.85, 0.0)]
    floors = [each(op, BOTH, key("over_floors"), max, **case) for op, case in ((linear, large), (block, FP32))]
    peers = each(block, BOTH, speedup(), **FP32)
    saved = each(block, BOTH, share("saved_mib", "eager"), max, **FP32)
    return [
        Target(f"{linear} V=256,000, memory of eager's beyond gradients", "x", 0.25, None, memory, low=True),
        Target(f"{linear} V=256,000, its three GEMMs", "x", 1.15, None, floors[0], low=True),
        Target(f"{linear} V=256,000, 85 % ignored over none", "x", 0.25, None, ratio(*times), low=True),
        Target(f"{block} {BOTH}, its six GEMMs and our attention", "x", 1.12, None, floors[1], low=True),
        Target(f"{block} {BOTH}, best of eager and compiled", "x", 1.0, None, peers),
        Target(f"{block}, saved of eager's", "x", 0.6, None, saved, low=True),
    ]


def _model(peaks: dict) -> list[Target]:
    def at_gemm_rate(row, r):
        return 100 * row["work"]["flops"] / (1e6 * r["ms"] * peaks["gemm_fp32"])

    step = {
        dtype: each("model_decode", FORWARD, key("ms"), max, dtype=dtype, cache="static")
        for dtype in ("float32", "bfloat16")
    }
    bound = each("model_decode", FORWARD, percent, cache="static", **FP32)
    generate = each("model_decode", "generate", speedup("Cohere"), **FP32)
    return [
        Target("model: train step, best peer", "x", 1.1, None, each("model_train", "train step", speedup())),
        Target(f"model: {BOTH}, of the GEMM rate", "%", None, 80, each("model_train", BOTH, at_gemm_rate)),
        Target("model: decode step fp32, of read bandwidth", "%", 85, None, bound),
        Target("model: decode step, bf16 weights over fp32", "x", 1.7, None, ratio(step["float32"], step["bfloat16"])),
        Target("model: generate fp32, Cohere's", "x", 1.5, None, generate),
    ]


def _decode_linear() -> list[Target]:
    def rows_of(n, value, **case):
        return each("decode_linear", FORWARD, value, N=n, **case)

    return [
        Target("decode_linear 1 row bf16, torch", "x", 1.6, None, rows_of(1, speedup(), **BF16)),
        Target("decode_linear 1 row fp32, of read bandwidth", "%", 95, None, rows_of(1, percent, **FP32)),
        Target("decode_linear 4 rows fp32, torch", "x", 1.8, None, rows_of(4, speedup(), **FP32)),
        Target("decode_linear 4 rows bf16, torch", "x", 1.3, None, rows_of(4, speedup(), **BF16)),
    ]


def _trends() -> list[Target]:
    def doubling(op: str, which: int, worst: Callable) -> Callable:
        def value(rows):
            found = [
                d[3:][which] for d in doublings(rows) if d[0]["op"] == op and d[0]["providers"][d[2]]["kind"] == "ours"
            ]
            return worst((x for x in found if x is not None), default=None)

        return value

    def gain(rows):
        return min((r["scaling"] for row in rows for _, r in ours_of(row) if "scaling" in r), default=None)

    return [
        Target("attention: T doubled, most", "x", 4.4, None, doubling("attention", 0, max), low=True),
        Target("attention: T doubled, least", "x", 3.6, None, doubling("attention", 0, min)),
        Target("attention: T doubled, peak memory", "x", 2.2, None, doubling("attention", 1, max), low=True),
        Target("attention_decode: S doubled", "x", 2.2, None, doubling("attention_decode", 0, max), low=True),
        Target("threads 1 to all, least gain", "x", 1.85, None, gain),
    ]


def for_machine(peaks: dict) -> list[Target]:
    kind = machine_kind(peaks)
    return [
        *_attention(kind),
        *_packed(),
        *_decode(),
        *_memory_bound(),
        *_composed(),
        *_model(peaks),
        *_decode_linear(),
        *_trends(),
    ]
