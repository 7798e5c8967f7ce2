"""Figures of results: throughput over batch, breakdown, utilisation, roofline, Pareto. Each returns a Figure.

Matplotlib without a display (Agg) is imported when a figure is made. Colours are fixed per category and scheme, so that
figures of one report can be read side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sim.describe.devices import Gpu
from sim.result import RunResult
from sim.schemes import SCHEMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CATEGORY_COLOURS = {
    "kv access": "#d1495b",
    "weight access": "#edae49",
    "compute": "#00798c",
    "vector work": "#5f6caf",
    "csd compute": "#66a182",
    "transfer": "#8d96a3",
    "framework": "#2e4057",
    "recompute": "#9b5de5",
}


def _figure(width: float = 7.0, height: float = 4.0) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _colour(scheme: str) -> str:
    """The same colour for a scheme in every figure."""
    return f"C{list(SCHEMES).index(scheme)}" if list(SCHEMES).index(scheme) < 10 else "black"


def throughput_over_batch(results: Iterable[RunResult], title: str = "") -> Figure:
    """Tokens/s against batch, one line per scheme; both axes logarithmic."""
    figure, axes = _figure()
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in results:
        lines.setdefault(r.scheme, []).append((r.batch, r.tokens_per_s))
    for order, (scheme, points) in enumerate(lines.items()):
        batch, rate = zip(*sorted(points))
        # The first on top: a scheme that falls back on it coincides with it as long as it fits.
        axes.plot(batch, rate, marker="o", label=scheme, color=_colour(scheme), zorder=3 - 0.01 * order)
    axes.set(
        xscale="log", yscale="log", xlabel="batch (sequences)", ylabel="throughput (tokens/s)", title=title
    )
    powers_of_two(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
    return figure


def powers_of_two(axes: Axes) -> None:
    """A logarithmic x axis whose ticks are plain integers."""
    from matplotlib.ticker import FuncFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    )


def breakdown(results: Sequence[RunResult]) -> Figure:
    """Share of decode time by category, one bar per result."""
    figure, axes = _figure(height=0.3 * len(results) + 1.5)
    names = [f"{r.scheme} ({r.model}, b{r.batch})" for r in results]
    left = [0.0] * len(results)
    for category, colour in CATEGORY_COLOURS.items():
        shares = [r.breakdown.get(category, 0.0) for r in results]
        if any(shares):
            axes.barh(names, shares, left=left, color=colour, label=category)
            left = [a + b for a, b in zip(left, shares)]
    axes.set(xlabel="share of decode time", xlim=(0, 1))
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    return figure


def utilisation(result: RunResult) -> Figure:
    """Busy share of each resource in decode."""
    items = sorted(result.utilisation.items(), key=lambda item: item[1])
    figure, axes = _figure(height=0.35 * len(items) + 1.2)
    colours = ["#d1495b" if name == result.bottleneck else "#8d96a3" for name, _ in items]
    axes.barh([n for n, _ in items], [v for _, v in items], color=colours)
    axes.set(xlabel=f"busy share of decode time, {result.scheme}", xlim=(0, 1))
    return figure


def roofline(
    gpu: Gpu, points: Mapping[str, tuple[float, float]], drive_gb_per_s: float | None = None
) -> Figure:
    """Ceilings of a GPU (and of a drive's flash) with points name -> (FLOP per byte, TFLOP/s achieved)."""
    figure, axes = _figure()
    intensity = [2.0**e for e in range(-3, 13)]
    axes.plot(
        intensity, [min(gpu.fp16_tflops, i * gpu.hbm_gb_per_s / 1e3) for i in intensity], label=gpu.name
    )
    if drive_gb_per_s:
        axes.plot(intensity, [i * drive_gb_per_s / 1e3 for i in intensity], "--", label="drive flash")
    for name, (x, y) in points.items():
        axes.plot([x], [y], "o", label=name)
    axes.set(xlabel="operational intensity (FLOP/byte)", ylabel="TFLOP/s", yscale="log")
    powers_of_two(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
    return figure


LABELS = {
    "tokens_per_s": "throughput (tokens/s)",
    "decode_tokens_per_s": "decode (tokens/s)",
    "energy_j_per_token": "energy (J/token)",
    "cost_usd_per_million_tokens": "cost (USD per million tokens)",
    "time_to_first_token_s": "time to first token (s)",
    "time_per_output_token_s": "time per output token (s)",
    "flash_lifetime_years": "flash lifetime (years)",
    "accuracy_top1": "top-1 agreement with the float model",
}


def _label(metric: str) -> str:
    return LABELS.get(metric, metric.replace("_", " "))


def pareto(rows: Sequence[Mapping[str, Any]], x: str, y: str, maximise: tuple[bool, bool]) -> Figure:
    """Scatter of two metrics with the non-dominated points joined; `maximise` says the better direction per axis."""
    from sim.pareto import front

    figure, axes = _figure()
    for scheme in dict.fromkeys(r["scheme"] for r in rows):
        chosen = [r for r in rows if r["scheme"] == scheme]
        axes.plot([r[x] for r in chosen], [r[y] for r in chosen], "o", label=scheme, color=_colour(scheme))
    best = sorted(front(rows, {x: maximise[0], y: maximise[1]}), key=lambda r: r[x])
    axes.plot([r[x] for r in best], [r[y] for r in best], color="#2e4057", lw=1, label="Pareto front")
    axes.set(xlabel=_label(x), ylabel=_label(y), xscale="log", yscale="log")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
    return figure
