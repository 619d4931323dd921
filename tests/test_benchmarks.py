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

import palm_kernels as pk
from palm_kernels import reference

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT))
from benchmarks import (  # noqa: E402
    bench_attention,
    bench_cross_entropy,
    bench_parallel_block,
    bench_swiglu,
    common,
    gate,
    gpu,
    gpu_peers,
    gpu_targets,
    machine,
    peers,
    report,
    rows,
    timing,
)

SWIGLU = dataclasses.replace(
    bench_swiglu.BENCHES[0],
    cases=common.cases("N F", (5, 33)),
    peers={"eager": bench_swiglu.BENCHES[0].peers["eager"]},
    quick=2,
    given=False,
)
ATTENTION = dataclasses.replace(
    bench_attention.BENCHES[0], cases=common.cases("B T H K D causal", (1, 9, 4, 1, 8, True)), quick=1
)
DECODE = dataclasses.replace(bench_attention.BENCHES[4], cases=common.cases("B S H D", (2, 40, 4, 8)), quick=1)
PEAKS = {"fma_fp32": 10.0, "dot_bf16": None, "gemm_fp32": 8.0, "gemm_bf16": 40.0, "copy": 5.0, "read": 7.0}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """run(*arguments): the report on tiny cases; gives (exit status, JSON, Markdown)."""
    monkeypatch.setattr(
        report, "measure_peaks", functools.partial(machine.measure_peaks, size=32, megabytes=1, repeats=1)
    )
    monkeypatch.setattr(report, "QUICK", timing.Effort(0.01, 2, 3, 60.0))
    monkeypatch.setattr(bench_swiglu, "BENCHES", [SWIGLU])
    monkeypatch.setattr(bench_attention, "BENCHES", [ATTENTION, DECODE])

    def run(*arguments):
        status = report.main(["--quick", "--results", str(tmp_path), *arguments])
        files = {path.suffix: path for path in tmp_path.glob("*/*")}
        assert {".json", ".md"} <= set(files)
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
    assert printed.count("picture: ") == 2  # nothing grows here
    for row in data["rows"]:
        assert row["label"] in printed and f"| {row['op']} | {row['label']} | {row['mode']} | palm cpu |" in markdown


def broken(gate, up):
    raise RuntimeError("it broke\nlong story")


def missing(gate, up):
    raise NotImplementedError("not on this machine")


def test_wrong_provider_is_not_timed(tiny, monkeypatch, capsys):
    silu = torch.nn.functional.silu
    others = {
        "off": lambda gate, up: silu(gate) * up * 1.01,
        "one off": lambda gate, up: (silu(gate) * up).index_fill(0, torch.tensor(2), 0.0),
        "no gradient": lambda gate, up: silu(gate.detach()) * up,
        "only without grad": lambda gate, up: silu(gate) * up + (0.0 if torch.is_grad_enabled() else 0.1),
        "other shape": lambda gate, up: (silu(gate) * up)[None],
        "broken": broken,
        "missing": missing,
        "right": lambda gate, up: silu(gate) * up,
    }
    monkeypatch.setattr(bench_swiglu, "BENCHES", [dataclasses.replace(SWIGLU, peers=others, quick=1)])
    status, data, markdown = tiny("--only", "swiglu")
    assert status == 0  # ours is right
    for row in data["rows"]:
        found = {name: r["status"] for name, r in row["providers"].items()}
        wrong = dict.fromkeys(("off", "one off", "no gradient", "only without grad", "other shape"), "wrong")
        assert found == {"palm cpu": "ok", **wrong, "broken": "failed", "missing": "absent", "right": "ok"}
        assert row["best_peer"] == "right" and "ms" not in row["providers"]["off"]
        assert "over budget" in row["providers"]["off"]["reason"]
        assert row["providers"]["broken"]["reason"] == "RuntimeError: it broke"
    assert "wrong: off, swiglu N5 F33 float32" in capsys.readouterr().err
    assert "wrong: off, swiglu N5 F33 float32" in markdown


def test_ours_wrong_fails_the_run(tiny, monkeypatch):
    monkeypatch.setattr(bench_swiglu, "BENCHES", [dataclasses.replace(SWIGLU, ours=lambda gate, up: gate + up)])
    status, data, _ = tiny("--only", "swiglu")
    assert status == 1 and data["rows"][0]["providers"]["palm cpu"]["status"] == "wrong"


def test_floors_are_timed_and_not_gated(tiny, monkeypatch):
    floored = dataclasses.replace(SWIGLU, floors={"half of it": lambda mode, gate, up: lambda: gate * 2}, quick=1)
    monkeypatch.setattr(bench_swiglu, "BENCHES", [floored])
    status, data, markdown = tiny("--only", "swiglu")
    assert status == 0 and "half of it (floor)" in markdown
    assert all(r["providers"]["half of it"]["ms"] > 0 and r["best_peer"] == "eager" for r in data["rows"])


def test_floors_together(tiny, monkeypatch):
    """The report sets our time against the sum of the floors, whose calls are made once."""
    made = []

    def floor(mode, gate, up):
        made.append(mode)
        return lambda: time.sleep(0.004)

    monkeypatch.setattr(
        bench_swiglu, "BENCHES", [dataclasses.replace(SWIGLU, floors={"one": floor, "other": floor}, quick=1)]
    )
    _, data, markdown = tiny("--only", "swiglu")
    assert made == ["forward"] * 2 + ["forward+backward"] * 2 and "over floors" in markdown
    for r in (r["providers"] for r in data["rows"]):
        assert r["palm cpu"]["over_floors"] == pytest.approx(r["palm cpu"]["ms"] / (r["one"]["ms"] + r["other"]["ms"]))
        assert r["palm cpu"]["over_floors"] < 1


def test_outputs_given(tiny, monkeypatch):
    """The kernels alone, on outputs that are there: recorded once, launched again, judged by the same bytes."""
    monkeypatch.setattr(bench_swiglu, "BENCHES", [dataclasses.replace(SWIGLU, given=True, quick=1)])
    status, data, _ = tiny("--only", "swiglu")
    both, given = data["rows"][1], data["rows"][3]
    assert (
        status == 0 and given["mode"] == "forward+backward, outputs given" and list(given["providers"]) == ["palm cpu"]
    )
    assert given["work"] == both["work"] and given["providers"]["palm cpu"]["of_bound"] > 0
    out, gate_, up = [], torch.randn(3, 40), torch.randn(3, 40)
    again = timing.outputs_given(lambda: out.append(pk.swiglu(gate_, up)))
    again()
    assert len(out) == 1 and out[0].abs().sum() > 0
    gate_.zero_()
    again()
    assert len(out) == 1 and out[0].abs().sum() == 0
    with pk.backend("reference"), pytest.raises(NotImplementedError):
        timing.outputs_given(lambda: pk.swiglu(gate_, up))


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
    results = timing.measure(calls, providers, "cpu", timing.Effort(0.0, 4, 9, 0.01))
    assert log.count("slow") == 1 and results["slow"]["calls"] == 1 and results["slow"]["ms"] >= 20
    assert results["raises"]["status"] == "failed" and "ZeroDivisionError" in results["raises"]["reason"]
    rounds = [x for x in log if x != "slow"][2:-2]  # without the first calls and those for memory
    assert len(rounds) == 8 and all({rounds[i], rounds[i + 1]} == {"a", "b"} for i in range(0, 8, 2))


def test_cold_inputs_are_many():
    args, works = timing.inputs(DECODE, {"B": 1, "S": 4096, "H": 16, "D": 256, "dtype": torch.float32})
    assert sum(k.nbytes + v.nbytes for (_, k, v), _ in args) > 4e8 and list(works) == ["forward"]


def test_peak_memory():
    machine.peak_memory(lambda: torch.ones(1000), "cpu")
    used = machine.peak_memory(lambda: torch.ones(2**23) + 1, "cpu")  # two of 32 MiB
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
            assert (bench.plan or hasattr(reference, bench.op)) and bench.quick <= len(bench.cases)
            assert len({common.describe_case(c) for c in bench.cases}) == len(bench.cases)


def test_floors_do_the_work_they_stand_for():
    """Flops of the floors are those of the ops they bound; the padded attention is the packed one's."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    args, _, work = bench_cross_entropy.linear_cross_entropy(40, 8, 50, 0.5, torch.float32)
    for mode in ("forward", "forward+backward"):
        assert count(bench_cross_entropy.gemms(mode, *args)) == work[mode].flops
    args, kwargs, work = bench_parallel_block.block(2, 12, 64, 16, torch.float32)
    floors = bench_parallel_block.BENCHES[0].floors
    causal = {mode: common.attention_work(2 * 4 * 12 * 12 / 2, 0, 16, torch.float32)[mode].flops for mode in work}
    for mode in work:
        assert count(floors["GEMMs"](mode, *args, **kwargs)) == work[mode].flops - causal[mode]
        assert floors["attention"](mode, *args, **kwargs)() is not None
    args, kwargs, _ = bench_attention.varlen((5, 9, 2), 4, 8, torch.float32)
    outs, grads = peers.palm_padded("forward+backward", *args, **kwargs)()
    assert outs[0].shape == (3, 9, 4, 8) and [g.shape for g in grads] == [(3, 9, 4, 8), (3, 9, 1, 8), (3, 9, 1, 8)]
    torch.testing.assert_close(outs[0][0, :5], pk.attention_varlen(*args, **kwargs)[:5])


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="needs two threads")
def test_scaling(tiny, monkeypatch):
    monkeypatch.setattr(rows, "bound", lambda *_: (1.0, "flops"))
    status, data, markdown = tiny("--only", "attention", "--scaling")
    found = [r["providers"]["palm cpu"] for r in data["rows"] if r["limited_by"] == "flops"]
    assert status == 0 and found and "## Threads" in markdown
    for r in found:
        assert list(r["threads"]) == ["1", str(torch.get_num_threads())]
        assert r["scaling"] == pytest.approx(r["threads"]["1"] / r["threads"][str(torch.get_num_threads())])
    assert not any("scaling" in r["providers"]["palm cpu"] for r in tiny("--only", "attention")[1]["rows"])


def test_saved_memory():
    x = torch.randn(2**18, requires_grad=True)
    assert machine.saved_memory(lambda: x.exp(), [x]) == 0  # its output
    assert machine.saved_memory(lambda: x.exp().sin().cos(), [x]) == 2
    assert machine.saved_memory(lambda: (x * 2, x.sin()), [x]) == 0  # its input


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
    monkeypatch.setattr(rows, "torch", NoGPU())
    monkeypatch.setattr(report, "require_gpu", lambda command: None)
    monkeypatch.setattr(report, "describe", lambda device: {"name": "none"})
    monkeypatch.setattr(report, "measure_peaks", lambda device: PEAKS)
    monkeypatch.setattr(report, "release", lambda: None)
    monkeypatch.setattr(
        rows, "training_memory", lambda forward, inputs: {"saved_mib": 1.0, "backward_mib": len(inputs)}
    )
    monkeypatch.setattr(timing, "clock_of", lambda device: machine.cpu_clock)
    monkeypatch.setattr(timing, "peak_memory", lambda call, device: 3.0)
    monkeypatch.setattr(report, "GPU_QUICK", timing.Effort(0.01, 2, 3, 60.0))
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
    for target in gpu_targets.TARGETS:
        assert target.name in said and f"| {target.name} |" in markdown
    assert "swiglu forward, of copy bandwidth" in said and "picture: " in said


def test_gpu_report_goes_on(gpu_report, monkeypatch, capsys):
    """A peer that is wrong is listed; a case that breaks off is the only one lost, and fails the run; so does one of ours."""
    broken = dataclasses.replace(ATTENTION, make=lambda **_: 1 / 0)
    others = dataclasses.replace(SWIGLU, peers={"off": lambda gate, up: gate})
    monkeypatch.setattr(gpu, "BENCHES", {"attention": [broken], "swiglu": [others]})
    status, data, markdown = gpu_report()
    assert status == 1 and len(data["rows"]) == 4
    assert "- broke off: attention B1 T9 H4 K1 D8 causal float32: ZeroDivisionError" in markdown
    monkeypatch.setattr(gpu, "BENCHES", {"swiglu": [others]})
    status, data, markdown = gpu_report()
    assert status == 0 and "- wrong: off, swiglu" in markdown
    assert gpu_report("--minutes", "0")[0] == 1 and "no time left: swiglu N5 F33 float32" in capsys.readouterr().err
    monkeypatch.setenv("PALM_KERNELS_BACKEND", "triton")
    assert gpu_report()[0] == 1


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
        verdicts = gate.gate(bench, case, common.providers_of(bench, "cpu"))
        found = {name: v["status"] for name, v in verdicts.items()}
        assert set(found.values()) <= {"ok", "absent"}, verdicts
        assert all(status == "ok" or name.startswith("SDPA") for name, status in found.items()), verdicts
