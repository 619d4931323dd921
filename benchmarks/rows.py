"""The rows of a report: what a case gave in each of its modes, and how that compares."""

import torch

import palm_kernels as pk

from .common import BOTH, GIVEN, Bench, Provider, describe_case, providers_of
from .machine import bound, saved_memory, training_memory
from .timing import Effort, measure, measure_threads, plan_of


def judge(results: dict[str, dict], limit: float, amount: float) -> str | None:
    """Adds to what was measured its rate, its share of the bound and, for ours, the ratio to the best peer, which it names,
    and the time over that of the floors together."""
    measured = {name: r for name, r in results.items() if "ms" in r}
    peers = [name for name, r in measured.items() if r["kind"] == "peer"]
    floors = [r["ms"] for r in measured.values() if r["kind"] == "floor"]
    best = min(peers, key=lambda name: measured[name]["ms"], default=None)
    for r in measured.values():
        r |= {"giga_per_second": amount / r["ms"] / 1e6, "of_bound": limit * 1e3 / r["ms"]}
        if best and r["kind"] == "ours":
            r["ratio"] = measured[best]["ms"] / r["ms"]
        if floors and r["kind"] == "ours":
            r["over_floors"] = r["ms"] / sum(floors)
    return best


def _add_training_memory(
    measured: dict, providers: list[Provider], training: dict, device: str, effort: Effort
) -> None:
    """saved_mib (on a GPU backward_mib too) of every provider that was measured, and was not too slow to run once more."""
    for p in providers:
        r = measured.get(p.name, {})
        if p.name in training and "ms" in r and r["ms"] < 1e3 * effort.patience:
            with pk.backend(p.backend):
                memory = training_memory(*training[p.name]) if device == "cuda" else None
                r |= memory or {"saved_mib": saved_memory(*training[p.name])}


def _named(bench: Bench, case: dict) -> dict:
    return {
        "op": bench.op,
        "case": {k: str(v).removeprefix("torch.") if k == "dtype" else v for k, v in case.items()},
        "variant": bench.variant,
        "grows": bench.grows,
        "label": f"{describe_case(case)} {bench.variant}".strip(),
    }


def run_case(
    stem: str, bench: Bench, case: dict, device: str, effort: Effort, seed: int, peaks: dict, threads: bool = False
) -> list[dict]:
    """One row a mode: the gate, then the measurements of every provider that passed it. threads: ours on one thread, too."""
    torch.compiler.reset()  # a compiled peer falls back to eager at its eighth shape
    torch.manual_seed(seed)
    rows = []
    with torch.device(device):
        providers = providers_of(bench, device)
        plan = plan_of(bench, case, providers)
        for mode, (prepare, work) in plan.modes.items():
            calls = prepare()
            fit = [p for p in providers if p.name in calls]
            measured = measure(calls, fit, device, effort)
            if mode == BOTH:
                _add_training_memory(measured, fit, plan.training, device, effort)
            shown = fit if mode.endswith(GIVEN) else providers
            results = {p.name: {"kind": p.kind, **plan.verdicts[p.name], **measured.get(p.name, {})} for p in shown}
            limit, limited_by = bound(peaks, work.flops, work.bytes, case["dtype"], bench.bandwidth)
            best = judge(results, limit, {"flops": work.flops, "bytes": work.bytes}[limited_by])
            if threads and limited_by == "flops":
                for p in (p for p in fit if p.kind == "ours" and "ms" in results[p.name]):
                    results[p.name] |= measure_threads(calls[p.name], p, effort)
            row = {"stem": stem, **_named(bench, case), "gated_at": plan.gated_at, "mode": mode, "work": work._asdict()}
            rows.append(
                {**row, "limited_by": limited_by, "bound_ms": limit * 1e3, "best_peer": best, "providers": results}
            )
            del calls
    return rows
