"""The pictures of a report: speed-up bars, roofline, time against size. Each function draws one, or gives None for want of rows."""

import io
from collections.abc import Callable
from pathlib import Path

from .common import BOTH, EAGER, FORWARD, GIVEN
from .machine import arithmetic
from .tables import ours_of, write

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
AHEAD, BEHIND, PLAIN, ALONE = "#2b6cb0", "#c05621", "#bcd3ec", "#1a202c"


def _fastest(row: dict) -> dict:
    return min((r for _, r in ours_of(row)), key=lambda r: r["ms"])


def _label(row: dict) -> str:
    words = [SHORT.get(word, word) for word in row["label"].split()]
    mode = "" if row["mode"] in (FORWARD, BOTH) else f", {row['mode']}"
    return " ".join(words) + mode


def _against(row: dict) -> tuple[float | None, float | None]:
    """How many times as fast as the best peer, and as plain torch."""
    ms = _fastest(row)["ms"]
    plain = [row["providers"][n]["ms"] for n in EAGER if "ms" in row["providers"].get(n, {})]
    best = row["providers"][row["best_peer"]]["ms"] / ms if row["best_peer"] else None
    return best, plain[0] / ms if plain else None


def _bars(rows: list[dict]) -> list[dict]:
    """One entry a case: its row with backward, or what there is, and the forward's speed-up beside it."""
    shown = [r for r in rows if ours_of(r) and r["best_peer"] and not r["mode"].endswith(GIVEN) and not r.get("grows")]
    both = {(r["op"], r["label"]) for r in shown if r["mode"] == BOTH}
    forward = {(r["op"], r["label"]): _against(r)[0] for r in shown if r["mode"] == FORWARD}
    found = []
    for row in shown:
        key = row["op"], row["label"]
        if row["mode"] != FORWARD or key not in both:
            best, plain = _against(row)
            alone = forward.get(key) if row["mode"] == BOTH else None
            found.append({"op": row["op"], "label": _label(row), "best": best, "plain": plain, "alone": alone})
    return sorted(found, key=lambda bar: [b["op"] for b in found].index(bar["op"]))


def speedup(pyplot, rows: list[dict], peaks: dict):
    """Horizontal bars on a log axis, grouped by op: ours against the best peer and against plain torch."""
    bars = _bars(rows)
    if not bars:
        return None
    places, heads, y = [], {}, 0.0
    for bar in bars:
        if bar["op"] not in heads:
            y += 0.5 if heads else 0.0
            heads[bar["op"]] = y
            y += 1.0
        places.append(y)
        y += 1.0
    figure, axes = pyplot.subplots(figsize=(9, max(3.4, 1.3 + 0.19 * y)), layout="constrained")
    for bar, at in zip(bars, places, strict=True):
        if bar["plain"]:
            axes.barh(at, bar["plain"] - 1, 0.8, left=1, color=PLAIN)
        axes.barh(at, bar["best"] - 1, 0.42, left=1, color=AHEAD if bar["best"] >= 1 else BEHIND)
        if bar["alone"]:
            axes.plot(bar["alone"], at, marker="|", markersize=8, markeredgewidth=1.8, color=ALONE)
        values = [1.0, *(bar[k] or 1.0 for k in ("plain", "best", "alone"))]
        axes.text(max(values) * 1.03, at, f"{bar['best']:.2f}", va="center", fontsize=7.5)
    ends = [bar[k] for bar in bars for k in ("plain", "best", "alone") if bar[k]]
    _log_axis(
        axes.xaxis,
        axes.set_xscale,
        axes.set_xlim,
        min(0.7, *(x * 0.9 for x in ends)),
        max(2.2, *(x * 1.25 for x in ends)),
    )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([*places, *heads.values()], [*(bar["label"] for bar in bars), *heads], fontsize=8)
    for tick in axes.get_yticklabels()[len(places) :]:
        tick.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y, -1)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel(
        "times as fast, forward and backward where there is one; the number is against the best peer", fontsize=8
    )
    _speedup_legend(pyplot, figure)
    return figure


def _speedup_legend(pyplot, figure) -> None:
    patch, line = pyplot.Rectangle, pyplot.Line2D
    handles = [patch((0, 0), 1, 1, color=c) for c in (AHEAD, BEHIND, PLAIN)]
    handles.append(line([], [], marker="|", color=ALONE, linestyle="", markersize=8, markeredgewidth=1.8))
    names = ["best peer", "best peer, we are slower", "plain torch", "best peer, forward alone"]
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _log_axis(axis, scale: Callable, limits: Callable, low: float, high: float) -> None:
    """Ticks at powers of two, written out."""
    scale("log", base=2)
    limits(low, high)
    axis.set_major_formatter(lambda x, _: f"{x:g}")


def roofline(pyplot, rows: list[dict], peaks: dict):
    """Ours by flops a byte and GFLOP/s, under the roofs that were measured in the same run."""
    points = [
        r for r in rows if ours_of(r) and r["work"]["flops"] and not r["mode"].endswith(GIVEN) and not r.get("grows")
    ]
    if not points:
        return None
    single = arithmetic(peaks, "fp32")
    half = max(single, arithmetic(peaks, "bf16"))
    figure, axes = pyplot.subplots(figsize=(9, 5.6), layout="constrained")
    intensity = [r["work"]["flops"] / r["work"]["bytes"] for r in points]
    low, high = min(*intensity, single / peaks["copy"]) / 1.6, max(*intensity, half / peaks["copy"]) * 1.6
    for peak, name, style in ((half, "bf16", "--"), (single, "fp32", "-")):
        ridge = peak / peaks["copy"]
        axes.plot([low, ridge, high], [low * peaks["copy"], peak, peak], color="black", linewidth=1, linestyle=style)
        axes.text(high, peak, f"{name} peak {peak:.0f} GF/s ", ha="right", va="bottom", fontsize=8)
    middle = max(low * 1.2, single / peaks["copy"] / 15)
    axes.text(middle * 1.2, middle * peaks["copy"], f"copy {peaks['copy']:.0f} GB/s", fontsize=8, va="top")
    ops = list(dict.fromkeys(r["op"] for r in points))
    shades = pyplot.colormaps["tab20"].colors  # the ten dark ones first
    colours = {op: (shades[::2] + shades[1::2])[i % 20] for i, op in enumerate(ops)}
    for row, x in zip(points, intensity, strict=True):
        marker = "o" if row["mode"] == FORWARD else "s"
        fill = colours[row["op"]] if row["case"]["dtype"] == "float32" else "none"
        y = row["work"]["flops"] / _fastest(row)["ms"] / 1e6
        axes.plot(
            x, y, marker=marker, color=colours[row["op"]], markerfacecolor=fill, markersize=6, linestyle="", alpha=0.9
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("flops a byte that must be moved", fontsize=9)
    axes.set_ylabel("GFLOP/s", fontsize=9)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    _roofline_legend(pyplot, figure, colours)
    return figure


def _roofline_legend(pyplot, figure, colours: dict) -> None:
    line = pyplot.Line2D
    handles = [line([], [], marker="o", color=colours[op], linestyle="") for op in colours]
    handles += [
        line([], [], marker=m, color="black", markerfacecolor=f, linestyle="")
        for m, f in (("o", "black"), ("s", "black"), ("o", "none"))
    ]
    figure.legend(
        handles, [*colours, "forward", "with backward", "16 bits"], loc="outside right upper", fontsize=8, frameon=False
    )


def time_against_size(pyplot, rows: list[dict], peaks: dict):
    """What growing T, or a growing cache, costs: ours and the peers that most people use."""
    series: dict[tuple, list[tuple[float, float]]] = {}
    for row in (r for r in rows if r.get("grows")):
        for name, r in row["providers"].items():
            if "ms" in r and (r["kind"] == "ours" or name in EAGER):
                at = (row["case"][row["grows"]], r["ms"])
                series.setdefault((row["op"], row["grows"], row["mode"], name), []).append(at)
    if not series:
        return None
    ops = list(dict.fromkeys((op, letter) for op, letter, *_ in series))
    figure, panels = pyplot.subplots(1, len(ops), figsize=(4.6 * len(ops), 4.2), layout="constrained", squeeze=False)
    for axes, (op, letter) in zip(panels[0], ops, strict=True):
        lines = {key: sorted(points) for key, points in series.items() if key[:2] == (op, letter)}
        for (_, _, mode, name), points in lines.items():
            colour = AHEAD if name not in EAGER else BEHIND
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=4,
                color=colour,
                linestyle="-" if mode == FORWARD else "--",
                label=f"{name}, {mode}",
            )
        sizes = sorted({x for points in lines.values() for x, _ in points})
        _log_axis(axes.xaxis, axes.set_xscale, axes.set_xlim, sizes[0] / 1.2, sizes[-1] * 1.2)
        axes.set_xticks(sizes)
        axes.set_yscale("log")
        axes.set(title=op, xlabel=letter, ylabel="ms")
        axes.grid(color="0.9")
        axes.legend(fontsize=8, frameon=False)
    return figure


PICTURES = {"speedup": speedup, "roofline": roofline, "time": time_against_size}


def pictures(rows: list[dict], peaks: dict, title: str, stem: Path) -> list[str]:
    """Writes <stem>-speedup.png, -roofline.png and -time.png, as far as there are rows for them; a line on each."""
    try:
        import matplotlib
    except ImportError:
        return ["no picture: matplotlib is not installed"]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    said = []
    for name, draw in PICTURES.items():
        figure = draw(pyplot, rows, peaks)
        if figure is None:
            continue
        figure.suptitle(title, fontsize=9)
        png, path = io.BytesIO(), stem.with_name(f"{stem.name}-{name}.png")
        figure.savefig(png, dpi=110)
        pyplot.close(figure)
        write(path, png.getvalue())
        said.append(f"picture: {path}")
    return said or ["no picture: nothing was measured"]
