"""`kvstrata simulate`: what a machine would achieve with a scheme, and what limits it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sim.result import RunResult


def command(
    scheme: Annotated[
        list[str] | None, typer.Argument(help="schemes; all that the machine can run if none")
    ] = None,
    machine: Annotated[str, typer.Option(help="machine preset or TOML file")] = "reference",
    model: Annotated[str, typer.Option(help="model preset, TOML file or config.json")] = "opt-13b",
    batch: Annotated[int, typer.Option(help="sequences")] = 64,
    input_tokens: Annotated[int, typer.Option(help="prompt tokens per sequence")] = 1024,
    output_tokens: Annotated[int, typer.Option(help="generated tokens per sequence")] = 1024,
    fidelity: Annotated[str, typer.Option(help="analytic, flow or page")] = "flow",
    set_: Annotated[list[str] | None, typer.Option("--set", help="device.field=value")] = None,
    trace: Annotated[Path | None, typer.Option(help="write a Perfetto timeline here")] = None,
    sources: Annotated[bool, typer.Option(help="print every value used with its source")] = False,
    sensitivity: Annotated[
        Path | None, typer.Option(help="write the table of sensitivities here and stop")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the full results as JSON")] = False,
) -> None:
    """Simulate schemes on a machine: throughput, bottleneck, breakdown, energy, and the limit behind each bandwidth."""
    import json

    from golden.spec import KVStrataError
    from sim.api import scheme_names, simulate
    from sim.describe.base import build
    from sim.describe.workload import Workload
    from sim.overrides import parse
    from sim.timeline import perfetto
    from sw_stack.cli.output import note, show_json, show_rows

    if sensitivity:
        from hw.flow.cache import write_atomically
        from sim.sensitivity import markdown

        write_atomically(sensitivity, markdown())
        return
    fields = {"batch": batch, "input_tokens": input_tokens, "output_tokens": output_tokens}
    workload = build(Workload, fields, "workload")
    results = []
    for name in scheme or scheme_names():
        try:
            results.append(simulate(machine, model, name, workload, fidelity, parse(set_ or [])))
        except KVStrataError as error:
            if scheme:
                raise
            note(f"{name}: {error}")
    if not results:
        raise KVStrataError(
            f"machine {machine} runs no scheme for {model} at batch {batch}; the reasons are above"
        )
    if trace:
        from hw.flow.cache import write_atomically

        write_atomically(trace, json.dumps(perfetto(results[0])))
    if as_json:
        show_json([r.to_dict() for r in results])
        return
    show_rows(f"{model} on {machine}, batch {batch}", [_row(r) for r in results], False)
    limits = {b["what"]: b for r in results for b in r.bandwidths}
    show_rows(
        "Bandwidths", [{k: b[k] for k in ("what", "gb_per_s", "binding")} for b in limits.values()], False
    )
    if sources:
        rows = {(a["device"], a["field"]): a for r in results for a in r.assumptions}
        show_rows(
            "Values and their sources",
            [{k: a[k] for k in ("device", "field", "value", "source")} for a in rows.values()],
            False,
        )


def _row(result: "RunResult") -> dict[str, object]:
    shares = sorted(result.breakdown.items(), key=lambda item: -item[1])
    return {
        "scheme": result.scheme,
        "tokens_per_s": result.tokens_per_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "first_token_s": result.time_to_first_token_s,
        "bottleneck": result.bottleneck,
        "breakdown": ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005),
        "j_per_token": result.energy_j_per_token,
        "usd_per_million": result.cost_usd_per_million_tokens,
    }
