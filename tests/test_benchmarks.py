"""The benchmark frame itself, on tiny cases: what it writes, and that a wrong provider is not timed."""

import dataclasses
import functools
import importlib
import json
import pathlib
import sys
import time

import pytest
import torch

from palm_kernels import reference

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT))
from benchmarks import bench_attention, bench_swiglu, common, gpu, gpu_peers, machine, plot, report, targets  # noqa: E402

SWIGLU = dataclasses.replace(
    bench_swiglu.BENCHES[0],
    cases=common.cases("N F", (5, 33)),
    peers={"eager": bench_swiglu.BENCHES[0].peers["eager"]},
    quick=2,
)
ATTENTION = dataclasses.replace(
    bench_attention.BENCHES[0], cases=common.cases("B T H K D causal", (1, 9, 4, 1, 8, True)), quick=1
)
DECODE = dataclasses.replace(bench_attention.BENCHES[2], cases=common.cases("B S H D", (2, 40, 4, 8)), quick=1)
PEAKS = {"fma_fp32": 10.0, "dot_bf16": None, "gemm_fp32": 8.0, "gemm_bf16": 40.0, "copy": 5.0, "read": 7.0}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """run(*arguments): the report on tiny cases; gives (exit status, JSON, Markdown)."""
    monkeypatch.setattr(
        report, "measure_peaks", functools.partial(machine.measure_peaks, size=32, megabytes=1, repeats=1)
    )
    monkeypatch.setattr(report, "QUICK", common.Effort(0.01, 2, 3, 60.0))
    monkeypatch.setattr(bench_swiglu, "BENCHES", [SWIGLU])
    monkeypatch.setattr(bench_attention, "BENCHES", [ATTENTION, DECODE])

    def run(*arguments):
        status = report.main(["--quick", "--results", str(tmp_path), *arguments])
        files = {path.suffix: path for path in tmp_path.glob("*/*")}
        assert sorted(files) == [".json", ".md"]
        return status, json.loads(files[".json"].read_text()), files[".md"].read_text()

    return run


def test_report(tiny, capsys):
    status, data, markdown = tiny("--only", "swiglu", "attention", "--seed", "3")
    assert status == 0
    assert data["seed"] == 3 and data["command"].endswith("--seed 3") and data["versions"]["torch"] == torch.__version__
    assert data["machine"]["name"] and data["commit"]
    assert all(data["peaks"][k] > 0 for k in ("gemm_fp32", "gemm_bf16", "copy", "read", "fma_fp32"))
    modes = [(r["op"], r["case"]["dtype"], r["mode"]) for r in data["rows"]]
    assert modes == [
        *(("swiglu", dtype, mode) for dtype in ("float32", "bfloat16") for mode in ("forward", "forward+backward")),
        *(("attention", "float32", mode) for mode in ("forward", "forward+backward")),
        ("attention_decode", "float32", "forward"),
    ]
    for row in data["rows"]:
        assert row["best_peer"] in row["providers"] and row["bound_ms"] > 0
        for r in row["providers"].values():
            assert r["status"] == "ok" and 0 < r["p20"] <= r["ms"] <= r["p80"] and r["calls"] >= 2
        ours = row["providers"]["palm cpu"]
        assert ours["ratio"] == pytest.approx(row["providers"][row["best_peer"]]["ms"] / ours["ms"])
    printed = capsys.readouterr().out
    for row in data["rows"]:
        assert row["label"] in printed and f"| {row['op']} | {row['label']} | {row['mode']} | palm cpu |" in markdown


def broken(gate, up):
    raise RuntimeError("it broke\nlong story")


def missing(gate, up):
    raise NotImplementedError("not on this machine")


def test_wrong_provider_is_not_timed(tiny, monkeypatch, capsys):
    silu = torch.nn.functional.silu
    peers = {
        "off": lambda gate, up: silu(gate) * up * 1.01,
        "one off": lambda gate, up: (silu(gate) * up).index_fill(0, torch.tensor(2), 0.0),
        "no gradient": lambda gate, up: silu(gate.detach()) * up,
        "only without grad": lambda gate, up: silu(gate) * up + (0.0 if torch.is_grad_enabled() else 0.1),
        "other shape": lambda gate, up: (silu(gate) * up)[None],
        "broken": broken,
        "missing": missing,
        "right": lambda gate, up: silu(gate) * up,
    }
    monkeypatch.setattr(bench_swiglu, "BENCHES", [dataclasses.replace(SWIGLU, peers=peers, quick=1)])
    status, data, markdown = tiny("--only", "swiglu")
    assert status == 1
    for row in data["rows"]:
        found = {name: r["status"] for name, r in row["providers"].items()}
        wrong = dict.fromkeys(("off", "one off", "no gradient", "only without grad", "other shape"), "wrong")
        assert found == {"palm cpu": "ok", **wrong, "broken": "failed", "missing": "absent", "right": "ok"}
        assert row["best_peer"] == "right" and "ms" not in row["providers"]["off"]
        assert "over budget" in row["providers"]["off"]["reason"]
        assert row["providers"]["broken"]["reason"] == "RuntimeError: it broke"
    assert "wrong: off, swiglu N5 F33 float32" in capsys.readouterr().err
    assert "wrong: off, swiglu N5 F33 float32" in markdown


def test_floors_are_timed_and_not_gated(tiny, monkeypatch):
    floored = dataclasses.replace(SWIGLU, floors={"half of it": lambda gate, up: gate * 2}, quick=1)
    monkeypatch.setattr(bench_swiglu, "BENCHES", [floored])
    status, data, markdown = tiny("--only", "swiglu")
    assert status == 0 and "half of it (floor)" in markdown
    assert all(r["providers"]["half of it"]["ms"] > 0 and r["best_peer"] == "eager" for r in data["rows"])


def test_bad_arguments(capsys):
    for arguments in (["--only", "nothing"], ["--threads", "0"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as error:
            report.main(arguments)
        assert error.value.code == 2


def test_measure_interleaves_and_is_patient_once():
    log = []
    names = ("a", "b", "slow", "raises")
    providers = [common.Provider(n, "peer", lambda: None) for n in names]
    calls = {n: functools.partial(log.append, n) for n in ("a", "b")}
    calls["slow"] = lambda: (log.append("slow"), time.sleep(0.02))
    calls["raises"] = lambda: 1 / 0
    results = common.measure(calls, providers, "cpu", common.Effort(0.0, 4, 9, 0.01))
    assert log.count("slow") == 1 and results["slow"]["calls"] == 1 and results["slow"]["ms"] >= 20
    assert results["raises"]["status"] == "failed" and "ZeroDivisionError" in results["raises"]["reason"]
    rounds = [x for x in log if x != "slow"][2:-2]  # without the first calls and those for memory
    assert len(rounds) == 8 and all({rounds[i], rounds[i + 1]} == {"a", "b"} for i in range(0, 8, 2))


def test_cold_inputs_are_many():
    args, works = common.inputs(DECODE, {"B": 1, "S": 4096, "H": 16, "D": 256, "dtype": torch.float32})
    assert sum(k.nbytes + v.nbytes for (_, k, v), _ in args) > 4e8 and list(works) == ["forward"]


def test_peak_memory():
    common.peak_memory(lambda: torch.ones(1000), "cpu")
    used = common.peak_memory(lambda: torch.ones(2**23) + 1, "cpu")  # two of 32 MiB
    assert used is None or 60 <= used <= 72


def test_bound():
    assert machine.bound(PEAKS, 10e9, 1e9, torch.float32, "copy") == (1.0, "flops")
    assert machine.bound(PEAKS, 10e9, 7e9, torch.bfloat16, "read") == (1.0, "bytes")


@pytest.mark.kernel
@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="the CPU's multiply-add units")
def test_peak_counts_its_work():
    """Each chain of the multiply-add ends at 2, so the sum says how many lanes there were."""
    out = torch.empty(3)
    flop = torch.ops.palm_kernels_cpu.peak(1000, "fma", out)
    assert torch.equal(out, out[:1].expand(3)) and flop == 1000 * out[0]
    dot = torch.ops.palm_kernels_cpu.peak(1000, "dot", out)
    isa = torch.ops.palm_kernels_cpu.isa()
    assert dot == (2 * flop if isa in ("v4-bf16", "v4-dot", "v4-amx") else -1)
    tile = torch.ops.palm_kernels_cpu.peak(1000, "tile", out)
    assert tile == (65536 * 1000 if isa == "v4-amx" else -1)


def test_bench_files():
    assert len(report.STEMS) >= 7
    for stem in report.STEMS:
        module = importlib.import_module(f"benchmarks.bench_{stem}")
        assert len((ROOT / "benchmarks" / f"bench_{stem}.py").read_text().splitlines()) <= 50, stem
        for bench in module.BENCHES:
            assert hasattr(reference, bench.op) and bench.quick <= len(bench.cases)
            assert len({common.describe_case(c) for c in bench.cases}) == len(bench.cases)


# ---- --device cuda, as far as it goes without a GPU ----
class NoGPU:
    """torch with the CPU where the report asks for CUDA."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def device(self, name):
        return torch.device("cpu")


@pytest.fixture
def gpu_report(monkeypatch, tmp_path):
    """run(*arguments): the GPU's report on tiny cases through the CPU kernels; gives (exit status, JSON, Markdown)."""
    monkeypatch.setenv("PALM_KERNELS_BACKEND", "cpu")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(report, "torch", NoGPU())
    monkeypatch.setattr(report, "require_gpu", lambda command: None)
    monkeypatch.setattr(report, "describe", lambda device: {"name": "none"})
    monkeypatch.setattr(report, "measure_peaks", lambda device: PEAKS)
    monkeypatch.setattr(report, "release", lambda: None)
    monkeypatch.setattr(
        report, "training_memory", lambda forward, leaves: {"saved_mib": 1.0, "backward_mib": len(leaves)}
    )
    monkeypatch.setattr(common, "clock_of", lambda device: machine.cpu_clock)
    monkeypatch.setattr(common, "peak_memory", lambda call, device: 3.0)
    monkeypatch.setattr(report, "GPU_QUICK", common.Effort(0.01, 2, 3, 60.0))
    swiglu = dataclasses.replace(SWIGLU, gate={"N": 2})
    monkeypatch.setattr(gpu, "BENCHES", {"swiglu": [swiglu], "attention": [ATTENTION]})

    def run(*arguments):
        status = report.main(["--quick", "--device", "cuda", *arguments])
        return status, json.loads((tmp_path / "quick.json").read_text()), (tmp_path / "quick.md").read_text()

    return run


def test_gpu_report(gpu_report, capsys):
    status, data, markdown = gpu_report()
    assert status == 0 and [r["op"] for r in data["rows"]] == ["swiglu"] * 4 + ["attention"] * 2
    both = data["rows"][1]["providers"]
    assert both["palm cpu"]["saved_mib"] == 1.0 and both["eager"]["backward_mib"] == 2
    assert "saved_mib" not in data["rows"][0]["providers"]["palm cpu"]
    said = capsys.readouterr().out
    for target in targets.TARGETS:
        assert target.name in said and f"| {target.name} |" in markdown
    assert "swiglu forward, of copy bandwidth" in said and "picture: " in said


def test_gpu_report_goes_on(gpu_report, monkeypatch, capsys):
    """A peer that is wrong is listed; a case that breaks off is the only one lost, and fails the run; so does one of ours."""
    broken = dataclasses.replace(ATTENTION, make=lambda **_: 1 / 0)
    peers = dataclasses.replace(SWIGLU, peers={"off": lambda gate, up: gate})
    monkeypatch.setattr(gpu, "BENCHES", {"attention": [broken], "swiglu": [peers]})
    status, data, markdown = gpu_report()
    assert status == 1 and len(data["rows"]) == 4
    assert "- broke off: attention B1 T9 H4 K1 D8 causal float32: ZeroDivisionError" in markdown
    monkeypatch.setattr(gpu, "BENCHES", {"swiglu": [peers]})
    status, data, markdown = gpu_report()
    assert status == 0 and "- wrong: off, swiglu" in markdown
    assert gpu_report("--minutes", "0")[0] == 1 and "no time left: swiglu N5 F33 float32" in capsys.readouterr().err
    monkeypatch.setenv("PALM_KERNELS_BACKEND", "triton")
    assert gpu_report()[0] == 1


def row(op, mode, ours, peers=(), **case):
    entry = {"kind": "ours", "of_bound": 0.9, **ours}
    others = {name: {"kind": "peer", **r} for name, r in dict(peers).items()}
    return {
        "op": op,
        "mode": mode,
        "case": case,
        "work": {"flops": 4e12},
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
    rows = [
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
    shown = {line[0]: (line[3], line[4]) for line in targets.lines(rows)}
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
    assert targets.lines([])[1][4] == "not measured"


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
        assert any(op == "attention" and case["D"] == D and targets.LONG.items() <= case.items() for op, case in made)
    assert targets.BLOCK in gpu.BLOCK and "eager" in gpu.LINEAR
    assert set(gpu.BENCHES) == set(report.STEMS)


def test_picture(tmp_path, monkeypatch):
    assert "nothing was measured" in plot.bar_chart([], "none", tmp_path / "x.png")
    rows = [
        {
            **row("swiglu", "forward", {"ms": 1.0}, {"eager": {"ms": 2.0, "of_bound": 0.4}}),
            "label": "N5",
            "best_peer": "eager",
        }
    ]
    assert plot.bar_chart(rows, "one", tmp_path / "x.png").startswith("picture")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.bar_chart(rows, "one", tmp_path / "y.png") == "no picture: matplotlib is not installed"


def test_gpu_clock_flushes_then_times_what_it_is_given():
    log = []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = len(log)
            log.append("record")

        def elapsed_time(self, end):
            return 1000.0 * (end.at - self.at)

    class Cuda:
        _sleep = staticmethod(lambda cycles: log.append("sleep"))
        synchronize = staticmethod(lambda: log.append("synchronize"))

    Cuda.Event = Event

    class Flush:
        zero_ = staticmethod(lambda: log.append("flush"))

    assert machine.gpu_clock(Cuda, Flush)(lambda: log.append("call")) == 2.0
    assert log == ["flush", "sleep", "record", "call", "record", "synchronize"]


def test_gpu_peers_answer_as_the_reference():
    """Those that run on a CPU, at tiny sizes; backends of SDPA that do not are absent, not failures."""
    tiny = {"attention": {"T": 24, "H": 4, "D": 16}, "attention_decode": {"B": 3, "S": 20, "H": 4, "D": 16}}
    tiny["parallel_block"] = {"B": 2, "T": 12, "C": 64, "D": 16}
    tiny["linear_cross_entropy"] = {"N": 20, "C": 16, "V": 50}
    for bench in (b for benches in gpu.BENCHES.values() for b in benches if b.op in tiny):
        skip = ("torch.compile", "FlexAttention", "F.linear_cross_entropy")
        plain = {n: p for n, p in bench.peers.items() if not n.startswith(skip)}
        if bench.op == "parallel_block":
            plain["PaLM-pytorch"] = gpu_peers.palm_pytorch_block
        case = {**bench.cases[0], **tiny[bench.op], **({"K": 2} if bench.variant else {})}
        bench = dataclasses.replace(bench, gate={}, peers=plain)
        verdicts = common.gate(bench, case, common.providers_of(bench, "cpu"))
        found = {name: v["status"] for name, v in verdicts.items()}
        assert set(found.values()) <= {"ok", "absent"}, verdicts
        assert all(status == "ok" or name.startswith("SDPA") for name, status in found.items()), verdicts
