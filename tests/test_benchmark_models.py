"""The whole models of the benchmarks, at tiny sizes: peers hold our weights, and the gate sees it where they do not."""

import dataclasses
import pathlib
import sys

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).parents[1]))
from benchmarks import bench_model, common, models


@pytest.fixture
def small_model(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(models, "SIZES", {"C": 32, "H": 4, "D": 8, "layers": 2, "V": 120})
    monkeypatch.setattr(models, "COLD", 1e5)


def test_model_peers_compute_what_ours_does(small_model):
    """With our weights under their names, every peer gives the reference's loss and gradients; one with others is wrong."""
    bench = bench_model.BENCHES[0]

    def off(sizes, weights, dtype=torch.float32):
        built = models.cohere(sizes, weights, dtype)
        with torch.no_grad():
            built.model.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
        return built

    off.of = models.cohere
    bench = dataclasses.replace(bench, peers={**bench_model.BUILDERS, "off": off})
    plan = bench.plan(bench, {"B": 2, "T": 12, "dtype": torch.float32}, common.providers_of(bench, "cpu"))
    found = {name: v["status"] for name, v in plan.verdicts.items()}
    assert found.pop("PaLM-pytorch") in ("ok", "absent")
    assert found == {"palm cpu": "ok", "Cohere": "ok", "off": "wrong"}
    for mode in ("forward+backward", "train step"):
        calls = plan.modes[mode][0]()
        assert {"palm cpu", "Cohere"} <= set(calls) and "off" not in calls
        calls["palm cpu"]()
    assert set(plan.training) == set(calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_decodes_as_the_reference(small_model, dtype):
    bench = bench_model.BENCHES[1]
    case = {"B": 1, "past": 9, "longest": 60, "cache": "dynamic", "dtype": dtype}
    plan = bench.plan(bench, case, common.providers_of(bench, "cpu"))
    assert {v["status"] for v in plan.verdicts.values()} == {"ok"}, plan.verdicts
    step, generate = (plan.modes[mode][0]() for mode in ("forward", "generate"))
    logits = step["palm cpu"]()
    assert logits.shape == (1, 1, 120) and torch.equal(step["palm cpu"](), logits)  # the token is forgotten again
    assert generate["palm cpu"]().shape == (1, 10 + models.NEW) and plan.modes["generate"][1].tokens == models.NEW
    if dtype == torch.float32:
        assert torch.equal(generate["palm cpu"](), generate["Cohere"]())
