"""`kvstrata simulate`: what a machine would achieve with a scheme, and what limits it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sim.describe.machine import Machine
    from sim.describe.model import Model
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
    framework: Annotated[str, typer.Option(help="serving framework preset or TOML file")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="device.field=value; also framework. and workload.")
    ] = None,
    best_policy: Annotated[
        bool, typer.Option(help="FlexGen schemes: search percentages, block and batch (up to --batch) first")
    ] = False,
    arrivals_per_s: Annotated[
        float, typer.Option(help="serve Poisson arrivals at this rate instead of a batch")
    ] = 0.0,
    requests: Annotated[int, typer.Option(help="number of Poisson arrivals")] = 200,
    arrival_trace: Annotated[Path | None, typer.Option(help="serve the requests of this CSV file")] = None,
    parquet: Annotated[Path | None, typer.Option(help="write one row of metrics per scheme here")] = None,
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
    from sim.api import check_fidelity, scheme_names, simulate, split_overrides, tuned
    from sim.describe.base import build
    from sim.describe.machine import load_machine
    from sim.describe.model import load_model
    from sim.describe.workload import Tuning, Workload
    from sim.overrides import parse
    from sim.policy import best_policy as search
    from sim.timeline import perfetto
    from sw_stack.cli.output import note, show_json, show_rows, write_file

    if sensitivity:
        from sim.sensitivity import markdown

        write_file(sensitivity, markdown())
        return
    # What every scheme shares is looked at once, so that its error is one sentence and not one per scheme.
    check_fidelity(fidelity)
    devices, served, work = split_overrides(parse(set_ or []))
    described, shape = load_machine(machine, devices), load_model(model)
    served = ({"": framework} if framework else {}) | served
    tuned(Tuning(), served)
    settings = {f"framework.{k}" if k else "framework": v for k, v in served.items()}
    if arrivals_per_s or arrival_trace:
        arrivals = (arrivals_per_s, requests, input_tokens, output_tokens)
        _serve(scheme or scheme_names(), described, shape, arrival_trace, arrivals, settings, as_json)
        return
    fields = {"batch": batch, "input_tokens": input_tokens, "output_tokens": output_tokens}
    workload = build(Workload, fields | work, "workload")
    batches = sorted({min(2**n, batch) for n in range(batch.bit_length() + 1)})
    results = []
    for name in scheme or scheme_names():
        try:
            if best_policy and name.startswith("flexgen"):
                results.append(search(described, shape, name, batches, workload, overrides=settings))
            else:
                results.append(simulate(described, shape, name, workload, fidelity, settings))
        except KVStrataError as error:
            if scheme:
                raise
            note(f"{name}: {error}")
    if not results:
        raise KVStrataError(
            f"machine {machine} runs no scheme for {model} at batch {batch}; the reasons are above"
        )
    if trace:
        write_file(trace, json.dumps(perfetto(results[0])))
    if parquet:
        from sim.store import write_parquet

        write_parquet([r.row() for r in results], parquet)
    if as_json:
        show_json([r.to_dict() for r in results])
        return
    show_rows(f"{model} on {machine}", [_row(r) for r in results], False)
    for result in results if best_policy else ():
        note(f"{result.scheme}: {result.policy}")
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


def _serve(
    schemes: list[str],
    machine: "Machine",
    model: "Model",
    trace: Path | None,
    arrivals: tuple[float, int, int, int],
    settings: "dict[str, object]",
    as_json: bool,
) -> None:
    """Latency percentiles of each scheme under request arrivals."""
    from golden.spec import KVStrataError
    from sim import serving
    from sw_stack.cli.output import note, show_rows, track

    requests = serving.trace(trace) if trace else serving.poisson(*arrivals)
    rows = []
    for name in track(schemes, "Serving"):
        try:
            rows.append(
                {"scheme": name, **serving.serve_on(machine, model, name, requests, settings=settings)}
            )
        except KVStrataError as error:
            note(f"{name}: {error}")
    if not rows:
        raise KVStrataError(
            f"machine {machine.name} serves {model.name} with no scheme; the reasons are above"
        )
    show_rows(f"{model.name} on {machine.name}, {len(requests)} requests", rows, as_json)


def _row(result: "RunResult") -> dict[str, object]:
    shares = sorted(result.breakdown.items(), key=lambda item: -item[1])
    return {
        "scheme": result.scheme,
        "batch": result.batch,
        "tokens_per_s": result.tokens_per_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "first_token_s": result.time_to_first_token_s,
        "bottleneck": result.bottleneck,
        "breakdown": ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005),
        "j_per_token": result.energy_j_per_token,
        "usd_per_million": result.cost_usd_per_million_tokens,
    }
