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
from benchmarks import bench_attention, bench_swiglu, common, machine, report  # noqa: E402

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
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            report.main(["--device", "cuda"])
        assert "no CUDA device" in capsys.readouterr().err


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
    flop = torch.ops.palm_kernels_cpu.peak(1000, False, out)
    assert torch.equal(out, out[:1].expand(3)) and flop == 1000 * out[0]
    dot = torch.ops.palm_kernels_cpu.peak(1000, True, out)
    assert dot == (2 * flop if torch.ops.palm_kernels_cpu.isa() == "v4-bf16" else -1)


def test_bench_files():
    assert len(report.STEMS) >= 7
    for stem in report.STEMS:
        module = importlib.import_module(f"benchmarks.bench_{stem}")
        assert len((ROOT / "benchmarks" / f"bench_{stem}.py").read_text().splitlines()) <= 50, stem
        for bench in module.BENCHES:
            assert hasattr(reference, bench.op) and bench.quick <= len(bench.cases)
            assert len({common.describe_case(c) for c in bench.cases}) == len(bench.cases)
