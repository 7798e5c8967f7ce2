"""Entry point: `simulate(machine, model, scheme, workload)` gives a `RunResult`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sim import energy, run
from sim.describe.base import ConfigError, did_you_mean, load
from sim.describe.machine import Machine, load_machine
from sim.describe.model import Model, load_model
from sim.describe.workload import Tuning, Workload
from sim.devices.flash import reclaim_s
from sim.result import RunResult
from sim.schemes import SCHEMES, scheme_class
from sim.schemes.base import Scheme

FIDELITIES = ("analytic", "flow", "page")


def bind(
    machine: str | Path | Machine,
    model: str | Path | Model,
    scheme: str,
    workload: Workload | None = None,
    overrides: Mapping[str, Any] | None = None,
    tuning: Tuning | None = None,
) -> Scheme:
    """A scheme bound to a machine; raises ConfigError or CapacityError where it cannot run."""
    chosen = scheme_class(scheme)
    devices, framework, work = split_overrides(overrides or {})
    described = load_machine(machine, devices)
    shape = model if isinstance(model, Model) else load_model(model)
    asked = workload or Workload()
    return chosen(
        described, shape, asked.replaced(**work) if work else asked, tuned(tuning or Tuning(), framework)
    )


def tuned(tuning: Tuning, changes: Mapping[str, Any]) -> Tuning:
    """`tuning`, or the preset that `changes` names under "", with the other fields changed."""
    fields = {k: v for k, v in changes.items() if k}
    base = load(Tuning, changes[""]) if "" in changes else tuning
    return base.replaced(**fields) if fields else base


def split_overrides(
    overrides: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(devices by path, framework fields with the preset under "", workload fields) of paths such as "csd.channels",
    "framework", "framework.gpu_batches" and "workload.sparsity"."""
    devices: dict[str, Any] = {}
    framework: dict[str, Any] = {}
    work: dict[str, Any] = {}
    for path, value in overrides.items():
        head, _, field = path.partition(".")
        if head in ("framework", "workload"):
            (framework if head == "framework" else work)[field] = value
        else:
            devices[path] = value
    return devices, framework, work


def simulate(
    machine: str | Path | Machine,
    model: str | Path | Model,
    scheme: str,
    workload: Workload | None = None,
    fidelity: str = "flow",
    overrides: Mapping[str, Any] | None = None,
    tuning: Tuning | None = None,
) -> RunResult:
    """Simulate one scheme.

    `machine` and `model` are preset names, files or objects; `overrides` changes fields by path: of devices
    ({"csd.channels": 16}), of the framework ({"framework": "cuda-graphs", "framework.gpu_batches": 4}) and of the
    workload ({"workload.sparsity": 0.25}). Raises ConfigError, CapacityError or CalibrationError, each one sentence.
    """
    check_fidelity(fidelity)
    return evaluate(bind(machine, model, scheme, workload, overrides, tuning), fidelity)


def check_fidelity(fidelity: str) -> None:
    """Raises ConfigError unless the fidelity has this name."""
    if fidelity not in FIDELITIES:
        hint = did_you_mean(fidelity, list(FIDELITIES))
        raise ConfigError(f"fidelity must be one of {', '.join(FIDELITIES)}, got {fidelity!r}{hint}")


def scheme_names() -> list[str]:
    """Every scheme."""
    return list(SCHEMES)


def evaluate(
    scheme: Scheme,
    fidelity: str = "flow",
    every_step: bool = False,
    all_layers: bool = False,
    detail: bool = True,
) -> RunResult:
    """Run a bound scheme. `every_step` and `all_layers` switch sampling off, to measure its error; without `detail`
    the result has neither timeline nor assumptions."""
    prefill = run.simulate_phase(scheme, scheme.prefill, fidelity, all_layers)
    decode = run.sampled_decode(scheme, fidelity, every_step, all_layers)
    step_s = decode.mean(lambda s: s.seconds)
    w = scheme.workload
    total_s = prefill.seconds + w.output_tokens * step_s
    by_category = decode.mean_of(lambda s: s.by_category)
    busy = decode.mean_of(lambda s: s.busy_s)
    used = {name: min(1.0, value / step_s) for name, value in busy.items()}
    tokens_per_s = w.generated_tokens / total_s
    power = energy.powers_w(scheme.machine, used, scheme.needs)
    middle = decode.steps[len(decode.steps) // 2]
    bytes_per_step = decode.mean_of(lambda s: s.pipe_bytes)
    return RunResult(
        machine=scheme.machine.name,
        model=scheme.model.name,
        scheme=scheme.name,
        fidelity=fidelity,
        batch=w.batch,
        input_tokens=w.input_tokens,
        output_tokens=w.output_tokens,
        tokens_per_s=tokens_per_s,
        decode_tokens_per_s=w.batch / step_s,
        prefill_tokens_per_s=w.batch * w.input_tokens / prefill.seconds,
        time_to_first_token_s=prefill.seconds,
        time_per_output_token_s=step_s,
        bottleneck=max(used, key=lambda name: used[name]),
        breakdown={c: v / sum(by_category.values()) for c, v in by_category.items()},
        breakdown_s=by_category,
        prefill_breakdown={c: v / sum(prefill.by_category.values()) for c, v in prefill.by_category.items()},
        utilisation=used,
        bytes_per_token={p: v / w.batch for p, v in bytes_per_step.items()},
        residency=scheme.residency(),
        bandwidths=[b.to_dict() for b in scheme.bandwidths],
        energy_j_per_token=sum(power.values()) / tokens_per_s,
        energy_breakdown_j={n: p / tokens_per_s for n, p in power.items()},
        energy_uncertainty=energy.ENERGY_UNCERTAINTY,
        cost_usd_per_million_tokens=energy.cost_usd_per_million(
            scheme.machine, scheme.needs, sum(power.values()), tokens_per_s
        ),
        **_endurance(scheme, tokens_per_s),
        policy=scheme.policy(),
        numerics=scheme.numerics(),
        assumptions=provenance(scheme) if detail else [],
        timeline=run.spans("prefill", prefill.run) + run.spans("decode step", middle.run) if detail else [],
    )


def _endurance(scheme: Scheme, tokens_per_s: float) -> dict[str, Any]:
    """Write amplification is 1: appended data is erased by whole blocks, never copied (append-only, SIM-WAF)."""
    per_token = scheme.flash_written_per_token()
    name = "csd" if "csd" in scheme.needs else "ssd"
    drive, count = getattr(scheme.machine, name), getattr(scheme.machine, f"{name}_count")
    if not per_token or drive is None:
        return {"flash_write_amplification": 1.0, "flash_lifetime_years": None, "flash_reclaim_s": 0.0}
    years = drive.capacity_gb * 1e9 * count * drive.pe_cycles / (per_token * tokens_per_s) / (365.25 * 86400)
    erased = reclaim_s(drive, per_token * scheme.workload.generated_tokens / count)
    return {"flash_write_amplification": 1.0, "flash_lifetime_years": years, "flash_reclaim_s": erased}


def provenance(scheme: Scheme) -> list[dict[str, Any]]:
    """Every value the result rests on with its source; `assumption` holds the register's id where one applies."""
    parts = set(scheme.needs) | ({"host"} if scheme.machine.host else set())
    parts |= {f"{p}_link" for p in ("ssd", "csd") if p in scheme.needs}
    devices = [getattr(scheme.machine, p) for p in sorted(parts) if getattr(scheme.machine, p, None)]
    rows = [row for d in (*devices, scheme.model, scheme.workload, scheme.tuning) for row in d.provenance()]
    for row in rows + (extra := scheme.provenance()):
        row["assumption"] = row["source"] if row["source"].startswith("SIM-") else ""
    return rows + extra
