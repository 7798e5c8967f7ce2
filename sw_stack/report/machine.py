"""What the report says of the machine beyond throughput: limits of bandwidths, energy and cost, and reproduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sw_stack.report.page import Column, field, figure, section, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sim.describe.devices import Csd, Gpu
    from sim.result import RunResult

HIDDEN, FFN = 5120, 20480
"""OPT-13B's, whose products stand in the roofline."""


def facts(results: Sequence[RunResult], chosen: Sequence[RunResult]) -> dict[str, Any]:
    """Plain data for summary.json: bandwidths with their limits, energy and cost, published beside modelled."""
    from sim import others
    from sim.reproduce import findings, reproduce, summary

    outcomes = reproduce()
    return {
        "bandwidths": bandwidths(chosen),
        "economics": [_economics(r) for r in chosen],
        "reproduction": {
            "rows": [o.to_dict() for o in outcomes],
            "others": [o.to_dict() for o in reproduce(others.rows())],
            "summary": summary(outcomes),
            "findings": findings(),
        },
    }


def bandwidths(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Every pipe once: its rate, what binds, and all limits in ascending order."""
    found = {b["what"]: b for r in results for b in r.bandwidths}
    return [
        {
            "what": b["what"],
            "gb_per_s": b["gb_per_s"],
            "binding": b["binding"],
            "limits": ", ".join(
                f"{name} {rate:.4g}" for name, rate in sorted(b["limits"].items(), key=_second)
            ),
        }
        for b in found.values()
    ]


def _second(item: tuple[str, float]) -> float:
    return item[1]


def _economics(r: RunResult) -> dict[str, Any]:
    busy = sorted(r.utilisation.items(), key=lambda item: -item[1])
    return {
        "model": r.model,
        "scheme": r.scheme,
        "batch": r.batch,
        "j_per_token": r.energy_j_per_token,
        "usd_per_million": r.cost_usd_per_million_tokens,
        "lifetime_years": r.flash_lifetime_years,
        "busy": ", ".join(f"{name} {100 * share:.0f}%" for name, share in busy[:4] if share >= 0.005),
    }


def figures(machine: str, results: Sequence[RunResult], chosen: Sequence[RunResult]) -> dict[str, str]:
    """Pareto front, busy shares of the drive scheme, and the roofline of a machine's GPU, as SVG."""
    from sim import plots
    from sim.describe.machine import load_machine

    described = load_machine(machine)
    first = [r for r in results if r.model == chosen[0].model]
    front = plots.pareto(
        [r.row() for r in first], "cost_usd_per_million_tokens", "energy_j_per_token", (False, False)
    )
    drawn = {"pareto": svg(front)}
    if described.gpu:
        drawn["roofline"] = svg(_roofline(described.gpu, described.csd))
    on_drive = next((r for r in chosen if r.scheme == "csd-sparf"), chosen[0])
    return drawn | {"utilisation": svg(plots.utilisation(on_drive))}


def _roofline(gpu: Gpu, drive: Csd | None) -> Figure:
    from sim import plots
    from sim.devices import gpu as kernels
    from sim.devices import gpu_attention

    points = {}
    for name, tokens in (("FFN, batch 1", 1), ("FFN, batch 64", 64), ("FFN, prefill of 2,048", 2048)):
        flops = 2.0 * tokens * HIDDEN * FFN
        size = 2.0 * (tokens * HIDDEN + HIDDEN * FFN + tokens * FFN)
        points[name] = (flops / size, flops / kernels.gemm(gpu, tokens, HIDDEN, FFN).seconds / 1e12)
    seconds = gpu_attention.decode(gpu, 64, 1536, 40, 40, 128).seconds
    flops = 4.0 * 64 * 1536 * HIDDEN
    points["decode attention, batch 64"] = (1.0, flops / seconds / 1e12)
    return plots.roofline(gpu, points, drive.channels * drive.channel_gb_per_s if drive else None)


def sections(system: Mapping[str, Any], drawn: Mapping[str, str]) -> list[dict[str, Any]]:
    """The page's sections, from `facts` and `figures`."""
    told = system["reproduction"]
    economy = [
        figure(drawn, "pareto", "Energy and cost per token over all batches; lower is better on both axes.")
    ]
    if "roofline" in drawn:
        caption = "OPT-13B's kernels on the GPU's roofline; dashed: the drive's channels."
        economy.append(figure(drawn, "roofline", caption))
    busy = figure(drawn, "utilisation", "Busy share of each resource while decoding; red: the bottleneck.")
    why = "Every bandwidth that the results above rest on, the limit that binds it, and all limits in GB/s."
    spent = "Nameplate power by utilisation (25% either way) and list prices over three years (40%)."
    beyond = "Published results of systems on which no parameter was set."
    findings = [text.replace("**", "") for text in told["findings"]]
    return [
        section("Why is a bandwidth this low?", why, system["bandwidths"], BANDWIDTHS, [busy]),
        section("Energy, cost and lifetime", spent, system["economics"], ECONOMICS, economy),
        section(
            "Published and modelled", _errors(told["summary"]), told["rows"], REPRODUCTION, notes=findings
        ),
        section("Other systems", beyond, told["others"], REPRODUCTION),
    ]


def _errors(stats: Mapping[str, float]) -> str:
    counted = [f"{stats[f'{what}_abs_error_pct_with_contradicted']:.1f}%" for what in ("mean", "worst")]
    return (
        f"Calibrated on {stats['calibration_rows']} rows. Of {stats['predicted_rows']} predicted rows the mean "
        f"absolute error is {stats['mean_abs_error_pct']:.1f}% and the worst {stats['worst_abs_error_pct']:.1f}%; with "
        f"the {stats['contradicted_rows']} rows that contradict their paper's other figures, {counted[0]} and "
        f"{counted[1]}."
    )


BANDWIDTHS = [
    field("What", "what"),
    field("GB/s", "gb_per_s", numeric=True),
    field("Bound by", "binding"),
    field("All limits", "limits"),
]
ECONOMICS = [
    field("Model", "model"),
    field("Scheme", "scheme"),
    field("Batch", "batch", numeric=True),
    field("J/token", "j_per_token", numeric=True),
    field("USD per million tokens", "usd_per_million", numeric=True),
    Column("Flash life, years", lambda row: row["lifetime_years"] or "", numeric=True),
    field("Busy", "busy"),
]
REPRODUCTION = [
    field("Source", "paper"),
    field("Figure", "what"),
    Column("Published", lambda row: f"{row['published']:g} {row['unit']}", numeric=True),
    Column("Modelled", lambda row: f"{row['modelled']:.4g} {row['unit']}", numeric=True),
    Column("Error", lambda row: f"{row['error_pct']:+.1f}%", numeric=True),
    field("Status", "kind"),
]
