"""What the report makes of its rows: targets on a CPU and on a GPU, what a doubling costs, pictures."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT))
from benchmarks import cpu_targets, gpu, gpu_targets, plot, report, tables, targets  # noqa: E402

PEAKS = {"fma_fp32": 10.0, "dot_bf16": None, "gemm_fp32": 8.0, "gemm_bf16": 40.0, "copy": 5.0, "read": 7.0}


def row(op, mode, ours, peers=(), **case):
    entry = {"kind": "ours", "of_bound": 0.9, **ours}
    others = {name: {"kind": "peer", **r} for name, r in dict(peers).items()}
    return {
        "op": op,
        "mode": mode,
        "case": case,
        "variant": "",
        "work": {"flops": 4e12, "bytes": 1e9, "tokens": 0},
        "providers": {"palm triton": entry, **others},
    }


def test_targets():
    long = {"B": 2, "T": 8192, "H": 16, "K": 1, "D": 256}
    sdpa = {"SDPA flash": {"ms": 20.0}, "SDPA cuDNN": {"ms": 15.0}, "FlexAttention": {"ms": 1.0}}
    token = 2 * 2 * 8192 * 256 / 2**20
    eager = {"eager": {"ms": 10.0, "memory_mib": 100.0}}
    block = {
        "torch.compile of PaLM-pytorch": {"ms": 13.0, "saved_mib": 10.0},
        "torch.compile": {"ms": 1.0, "saved_mib": 1.0},
    }
    found = [
        row("attention", "forward", {"ms": 10.0}, **long),
        row("attention", "forward+backward", {"ms": 20.0, "backward_mib": 18.2 * token}, sdpa, **long),
        row("attention", "forward", {"ms": 1e-3}, **{**long, "K": 8}),
        row("swiglu", "forward", {"ms": 1.0, "of_bound": 0.86}),
        row("cross_entropy", "forward", {"ms": 1.0, "of_bound": 0.95}),
        row("cross_entropy", "forward", {"ms": 1.0, "of_bound": 0.5}),
        row("linear_cross_entropy", "forward+backward", {"ms": 6.0, "memory_mib": 30.0}, eager),
        row("parallel_block", "forward+backward", {"ms": 10.0, "saved_mib": 5.0}, block),
        row("rotary", "forward", {"status": "wrong"}),
    ]
    shown = {line[0]: (line[3], line[4]) for line in targets.lines(targets.results(gpu_targets.TARGETS, found))}
    assert shown["attention forward, MQA, D=256, T=8k"] == ("400 TFLOP/s", "floor")
    assert shown["attention forward+backward, D=256, SDPA's best"] == ("0.75 x", "floor")
    assert shown["dK, dV and scratch over dK+dV, D=256"] == ("1.1 x", "floor")
    assert shown["swiglu forward, of copy bandwidth"] == ("86 %", "floor")
    assert shown["cross_entropy forward, of copy bandwidth"] == ("50 %", "below the floor")
    assert shown["linear_cross_entropy V=128k, time of eager's"] == ("0.6 x", "goal")
    assert shown["linear_cross_entropy V=128k, memory of eager's"] == ("0.3 x", "below the floor")
    assert shown["parallel_block, torch.compile of PaLM-pytorch"] == ("1.3 x", "floor")
    assert shown["parallel_block, saved of torch.compile of PaLM-pytorch"] == ("0.5 x", "floor")
    assert shown["rotary forward, of copy bandwidth"] == ("-", "not measured")
    assert targets.results(gpu_targets.TARGETS, [])[0]["verdict"] == "not measured"


def test_targets_name_cases_that_are_measured():
    made = [(b.op, case) for benches in gpu.BENCHES.values() for b in benches for case in b.cases[: b.quick]]
    assert {op for op, _ in made} >= {
        "attention",
        "attention_decode",
        "linear_cross_entropy",
        "parallel_block",
        "swiglu",
    }
    for D in (128, 256):
        assert any(
            op == "attention" and case["D"] == D and gpu_targets.LONG.items() <= case.items() for op, case in made
        )
    assert gpu_targets.BLOCK in gpu.BLOCK and "eager" in gpu.LINEAR
    assert set(gpu.BENCHES) == set(report.STEMS) - {"model"}


def series(op, grows, label, mode="forward", **case):
    """A row as a report has it."""
    found = row(
        op, mode, {"ms": 4.0, "memory_mib": 2.0}, {"SDPA": {"ms": 8.0, "memory_mib": 4.0}}, dtype="float32", **case
    )
    return {**found, "label": label, "best_peer": "SDPA", "grows": grows}


def test_pictures(tmp_path, monkeypatch):
    assert plot.pictures([], PEAKS, "none", tmp_path / "x") == ["no picture: nothing was measured"]
    found = [series("attention", "T", f"T{T}", T=T) for T in (8, 16)]
    found += [
        series("swiglu", "", "N5", mode, N=5) for mode in ("forward", "forward+backward", "forward, outputs given")
    ]
    found.append(series("rotary", "", "bfloat16"))
    found.append({**series("rotary", "", "alone"), "best_peer": None})
    found.append({**series("rotary", "", "wrong"), "providers": {"palm cpu": {"kind": "ours", "status": "wrong"}}})
    said = plot.pictures(found, PEAKS, "one", tmp_path / "x")
    assert said == [f"picture: {tmp_path}/x-{name}.png" for name in ("speedup", "roofline", "time")]
    for name in ("speedup", "roofline", "time"):
        assert (tmp_path / f"x-{name}.png").read_bytes()[:4] == b"\x89PNG"
    bars = plot._bars(found)
    assert [(b["op"], b["label"], b["best"], b["plain"], b["alone"]) for b in bars] == [
        ("swiglu", "N5", 2.0, 2.0, 2.0),
        ("rotary", "bf16", 2.0, 2.0, None),
    ]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.pictures(found, PEAKS, "one", tmp_path / "y") == ["no picture: matplotlib is not installed"]


def test_growth():
    found = [series("attention", "T", "", T=T) for T in (8, 16, 64)]
    found[1]["providers"]["palm triton"] |= {"ms": 15.0, "memory_mib": 4.2}
    lines = tables.growth(found)
    assert lines[1] == ["attention", "forward", "palm triton", "T 8", "T 16", "3.75x", "2.10x"] and len(lines) == 3
    values = {t["name"]: t for t in targets.results(cpu_targets.for_machine(PEAKS), found)}
    assert values["attention: T doubled, most"]["reached"] == values["attention: T doubled, least"]["reached"] == 3.75
    assert values["attention: T doubled, peak memory"]["verdict"] == "floor"
    assert values["attention_decode: S doubled"]["verdict"] == "not measured"


def test_cpu_targets_follow_the_peaks():
    kinds = {(10, None, 8, 9): "slow dot", (10, 20, 8, 18): "fast dot", (10, 5, 8, 60): "tile unit"}
    for (fma, dot, single, half), kind in kinds.items():
        peaks = {"fma_fp32": fma, "dot_bf16": dot, "gemm_fp32": single, "gemm_bf16": half}
        assert cpu_targets.machine_kind(peaks) == kind
        bars = {t.name: t.floor for t in cpu_targets.for_machine(peaks)}
        assert bars["attention D=128 forward bfloat16, SDPA"] == cpu_targets.OVER_SDPA[kind]["bfloat16"][0][0][1]


def test_cpu_targets_say_what_was_reached():
    long = {"variant": "", "dtype": "float32", "causal": True}
    lengths = (10, 5)  # 125 of 200 pairs
    gradients = 4 * 1024 * (1024 + 256000) / 2**20
    loss = {"N": 1024, "C": 1024, "V": 256000, "dtype": "float32"}
    eager = {"eager": {"ms": 30.0, "memory_mib": gradients + 400, "saved_mib": 10.0}}
    both = "forward+backward"
    found = [
        row(
            "attention",
            "forward",
            {"ms": 10.0, "of_bound": 0.8},
            {"SDPA": {"ms": 30.0}, "SDPA gqa": {"ms": 19.0}},
            D=64,
            **long,
        ),
        row("attention_varlen", "forward", {"ms": 6.5, "over_floors": 0.65}, lengths=lengths),
        row(
            "linear_cross_entropy",
            both,
            {"ms": 20.0, "over_floors": 1.2, "memory_mib": gradients + 90},
            eager,
            ignored=0.0,
            **loss,
        ),
        row("linear_cross_entropy", both, {"ms": 4.0}, ignored=0.85, **loss),
        row("parallel_block", both, {"ms": 20.0, "over_floors": 1.1, "saved_mib": 7.0}, eager, dtype="float32"),
        row("swiglu", "forward, outputs given", {"ms": 1.0, "of_bound": 0.7}, N=2048, dtype="float32"),
        row("model_decode", "forward", {"ms": 6.0}, cache="static", dtype="float32"),
        row("model_decode", "forward", {"ms": 3.0}, cache="static", dtype="bfloat16"),
        row("swiglu", both, {"ms": 1.0, "scaling": 1.9}),
        row("swiglu", both, {"ms": 1.0, "scaling": 1.7}),
    ]
    shown = {t["name"]: (t["reached"], t["verdict"]) for t in targets.results(cpu_targets.for_machine(PEAKS), found)}
    wanted = {
        "attention D=64 forward float32, SDPA": (1.9, "floor"),
        "attention D=64 forward float32, of the peak": (80, "floor"),
        "attention_varlen forward: time over padded, over pairs kept": (0.65 / 0.625, "floor"),
        "linear_cross_entropy V=256,000, memory of eager's beyond gradients": (90 / 400, "floor"),
        "linear_cross_entropy V=256,000, its three GEMMs": (1.2, "below the floor"),
        "linear_cross_entropy V=256,000, 85 % ignored over none": (0.2, "floor"),
        "parallel_block forward+backward, its six GEMMs and our attention": (1.1, "floor"),
        "parallel_block, saved of eager's": (0.7, "below the floor"),
        "swiglu, outputs given, of copy bandwidth": (70, "below the floor"),
        "model: decode step, bf16 weights over fp32": (2.0, "floor"),
        "threads 1 to all, least gain": (1.7, "below the floor"),
    }
    for name, (reached, verdict) in wanted.items():
        assert shown[name] == (pytest.approx(reached), verdict), name


def test_cpu_targets_name_cases_that_are_measured():
    """Every target of the table finds a row in a report of all cases."""
    made = []
    for _, bench, case in report.chosen(None, quick=False):
        entry = {"ms": 1.0, "of_bound": 0.5, "over_floors": 1.0, "memory_mib": 9.0, "saved_mib": 1.0, "scaling": 2.0}
        others = {name: {"kind": "peer", **entry, "memory_mib": 1e5} for name in bench.peers}
        case = {**case, "dtype": str(case["dtype"]).removeprefix("torch.")}
        for mode in ("forward", "forward+backward", "train step", "generate", "forward, outputs given"):
            shown = {"variant": bench.variant, "grows": bench.grows, "work": {"flops": 1.0, "bytes": 1.0, "tokens": 0}}
            ours = {"palm cpu": {"kind": "ours", **entry}}
            made.append({"op": bench.op, "mode": mode, "case": case, **shown, "providers": {**ours, **others}})
    missing = [t["name"] for t in targets.results(cpu_targets.for_machine(PEAKS), made) if t["reached"] is None]
    assert [t for t in missing if not t.startswith("decode_linear") or "decode_linear" in report.STEMS] == []
