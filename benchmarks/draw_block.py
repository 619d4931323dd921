"""Draws the parallel block as it is computed: `python -m benchmarks.draw_block` writes palm_kernels/models/parallel_block.svg.

The same bytes each time with one version of matplotlib; letters become paths, so that no viewer's fonts move them.
"""

import sys
from pathlib import Path

PICTURE = Path(__file__).parent.parent / "palm_kernels/models/parallel_block.svg"
INK, FAINT, SAVED = "#1a202c", "#64748b", "#b91c1c"
GEMM, KERNEL, ATTEND, GATED = "#e2e8f0", "#fef3c7", "#dbeafe", "#dcfce7"
MIDDLE = 2.6  # the height of x's own line
SMALL = 8.5


def _box(axes, x: float, y: float, width: float, height: float, colour: str, text: str, size: float = 10) -> None:
    """A rounded box about (x, y); its text's first line is bold."""
    from matplotlib.patches import FancyBboxPatch

    shape = "round,pad=0,rounding_size=0.08"
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=shape, facecolor=colour, edgecolor=INK, linewidth=1))
    first, *rest = text.split("\n")
    axes.text(x, y + 0.11 * len(rest), first, ha="center", va="center", fontsize=size, weight="bold", color=INK)
    for i, line in enumerate(rest):
        axes.text(x, y + 0.11 * len(rest) - 0.24 * (i + 1), line, ha="center", va="center", fontsize=SMALL, color=INK)


def _arrow(axes, *points: tuple[float, float], text: str = "", above: float = 0.13) -> None:
    """A line through the points that ends in an arrow; its text stands over the last stretch."""
    axes.plot(*zip(*points, strict=True), color=INK, linewidth=1.1, solid_joinstyle="round", zorder=0.5)
    axes.annotate(
        "", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
    )
    if text:
        middle = (points[-1][0] + points[-2][0]) / 2
        axes.text(middle, points[-1][1] + above, text, ha="center", va="center", fontsize=SMALL, color=FAINT)


def _saved(axes, x: float, y: float) -> None:
    axes.plot(x, y, marker="o", markersize=6, color=SAVED, zorder=5)


def _columns(axes) -> None:
    """The two wide buffers, by their parts: what one GEMM writes and what the other reads."""
    parts = (
        ("q", "H·D", ATTEND, 0.9),
        ("k", "D", ATTEND, 0.4),
        ("v", "D", ATTEND, 0.4),
        ("gate", "F", GATED, 0.9),
        ("up", "F", GATED, 0.9),
    )
    top = 4.35
    for name, width, colour, height in parts:
        _box(axes, 4.4, top - height / 2, 0.95, height, colour, f"{name}  {width}", 9.5)
        top -= height
    for name, width, colour, height in (("attended", "H·D", ATTEND, 1.7), ("product", "F", GATED, 1.8)):
        _box(
            axes,
            8.95,
            4.35 - height / 2 - (1.7 if name == "product" else 0),
            0.95,
            height,
            colour,
            f"{name}\n{width}",
            9.5,
        )


def draw(figure) -> None:
    """The block from left to right, the residual line below it, a legend at the foot."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12), ylim=(-0.95, 5.2))
    axes.axis("off")
    axes.text(
        0.25,
        4.95,
        "x + [ attention | swiglu ] · w_outᵀ,   [ q | k | v | gate | up ] = norm(x) · w_inᵀ",
        fontsize=11,
        weight="bold",
        color=INK,
        va="center",
    )
    axes.text(0.48, MIDDLE, "x", fontsize=12, weight="bold", color=INK, ha="center", va="center")
    _saved(axes, 0.62, MIDDLE + 0.24)
    _arrow(axes, (0.62, MIDDLE), (1.25, MIDDLE), text="B,T,C")
    _box(axes, 1.65, MIDDLE, 0.8, 0.8, KERNEL, "norm\none kernel")
    _saved(axes, 2.05, MIDDLE + 0.4)
    _arrow(axes, (2.05, MIDDLE), (2.55, MIDDLE), text="B,T,C")
    _box(axes, 3.0, MIDDLE, 0.9, 1.5, GEMM, "in_proj\none GEMM\n(H+2)D + 2F\nby C")
    _arrow(axes, (3.45, MIDDLE), (3.92, MIDDLE))
    _columns(axes)
    _saved(axes, 4.875, 4.35)
    _arrow(axes, (4.88, 3.7), (5.35, 3.7))
    _box(axes, 5.8, 3.7, 0.9, 0.8, KERNEL, "rotary\nq, k in place")
    _arrow(axes, (6.25, 3.7), (6.75, 3.7))
    _box(axes, 7.4, 3.5, 1.3, 1.7, ATTEND, "attention\none kernel\nH query heads,\n1 key/value head\nno T by T matrix")
    axes.text(5.8, 4.25, "q  B,T,H,D    k  B,T,D", fontsize=SMALL, color=FAINT, ha="center", va="center")
    _arrow(axes, (4.88, 2.85), (6.75, 2.85), text="v   B,T,D")
    _saved(axes, 8.05, 4.35)
    _arrow(axes, (8.05, 3.5), (8.47, 3.5))
    _saved(axes, 9.425, 4.35)
    _arrow(axes, (4.88, 1.75), (6.75, 1.75), text="gate, up   B,T,F")
    _box(axes, 7.4, 1.75, 1.3, 1.3, GATED, "SwiGLU\none kernel\nsilu(gate) · up")
    _arrow(axes, (8.05, 1.75), (8.47, 1.75))
    _arrow(axes, (9.43, MIDDLE), (9.85, MIDDLE))
    _box(axes, 10.3, MIDDLE, 0.9, 1.5, GEMM, "out_proj\none GEMM\nC by\n(H·D + F)")
    _arrow(axes, (10.75, MIDDLE), (11.08, MIDDLE))
    axes.plot(11.2, MIDDLE, marker="o", markersize=15, markerfacecolor="white", markeredgecolor=INK)
    axes.text(11.2, MIDDLE, "+", fontsize=12, color=INK, ha="center", va="center_baseline")
    _arrow(axes, (11.33, MIDDLE), (11.85, MIDDLE), text="B,T,C")
    _arrow(axes, (0.48, MIDDLE - 0.2), (0.48, 0.5), (11.2, 0.5), (11.2, MIDDLE - 0.17))
    axes.text(
        5.9, 0.36, "the residual: added inside the second GEMM", fontsize=SMALL, color=FAINT, ha="center", va="top"
    )
    _saved(axes, 0.35, -0.1)
    lines = (
        (
            INK,
            "saved for backward: x, the norm's statistics, the fused projection (q, k rotated), attention's output and lse",
        ),
        (
            FAINT,
            "made again in backward: norm(x) and the SwiGLU product.   B rows, T tokens, C model dim, H query heads of D, F SwiGLU dim.",
        ),
        (FAINT, "A serial block has two norms and four GEMMs, and its SwiGLU waits for its attention."),
    )
    for i, (colour, line) in enumerate(lines):
        axes.text(0.5, -0.1 - 0.3 * i, line, fontsize=SMALL, color=colour, va="center")


def main(path: Path = PICTURE) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.hashsalt": "parallel_block", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    ):
        figure = Figure(figsize=(11, 5.55), facecolor="white")
        draw(figure)
        # the one entry that changes from run to run; a PNG has none
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=110, metadata=metadata)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
