"""The picture of a report: for every case the share of the bound that ours and the best peer reach."""

import io
from pathlib import Path

from .tables import write


def bar_chart(rows: list[dict], title: str, path: Path) -> str:
    """Writes a PNG and says so, or why not."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []  # label, {series: per cent of the bound}
    for row in rows:
        shares = {n: 100 * r["of_bound"] for n, r in row["providers"].items() if r["kind"] == "ours" and "ms" in r}
        if row["best_peer"]:
            shares["best peer"] = 100 * row["providers"][row["best_peer"]]["of_bound"]
        if shares:
            drawn.append((f"{row['op']} {row['label']} {row['mode']}", shares))
    if not drawn:
        return "no picture: nothing was measured"
    series = list(dict.fromkeys(name for _, shares in drawn for name in shares))
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.22 * len(series) * len(drawn)), layout="constrained")
    height = 0.8 / len(series)
    for i, name in enumerate(series):
        places = [y + (i - (len(series) - 1) / 2) * height for y, (_, s) in enumerate(drawn) if name in s]
        axes.barh(places, [s[name] for _, s in drawn if name in s], height, label=name)
    axes.set_yticks(range(len(drawn)), [label for label, _ in drawn], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(100, color="grey", linewidth=0.8)
    axes.set_xlabel("per cent of what the measured peaks allow")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    png = io.BytesIO()
    figure.savefig(png, dpi=110)
    pyplot.close(figure)
    write(path, png.getvalue())
    return f"picture: {path}"
