"""The results block of README.md, written from a report's summary so that no figure in it is typed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from golden.spec import KVStrataError

BEGIN, END = "<!-- results: written by `make docs` from the last `make sim` -->", "<!-- end of results -->"


REPRODUCTION = ("<!-- reproduction: written by `make docs` -->", "<!-- end of reproduction -->")
HARDWARE_TEXT = (
    "<!-- hardware text: written by `make docs` from the last `kvstrata generate --save` of the RTL -->",
    "<!-- end of hardware text -->",
)


def with_results(page: str, summary: Mapping[str, Any]) -> str:
    """`page` with its results block replaced; `KVStrataError` if the page does not hold the two marks in order."""
    return _replaced(page, (BEGIN, END), results(summary))


def with_reproduction(page: str) -> str:
    """`page` with its table of published and modelled figures computed anew."""
    return _replaced(page, REPRODUCTION, reproduction())


def with_hardware_text(page: str, run: Mapping[str, Any]) -> str:
    """`page` with the text that the RTL wrote, from the JSON of `kvstrata generate --device rtl --check --save`.

    KVStrataError for a run of another device, or one that was not held against the golden device.
    """
    if run["setup"]["device"] != "rtl" or not run["equal_to_golden"]:
        raise KVStrataError(
            f"README shows text of device rtl that was checked against golden; got device {run['setup']['device']!r}, "
            f"checked {run['equal_to_golden']!r}"
        )
    return _replaced(page, HARDWARE_TEXT, hardware_text(run))


def hardware_text(run: Mapping[str, Any]) -> str:
    """Prompt, text, what was equal, cycles, and the command that writes it again."""
    setup, cycles = run["setup"], run["cycles"]
    named = {"hbm": "the HBM model", "random": "a memory that answers at random"}
    memory = named.get(setup["memory"], f"a memory latency of {setup['memory']} cycles")
    command = (
        f"kvstrata generate --device rtl --engine {setup['engine']} --weights {setup['weights']} --kv {setup['kv']} "
        f"--context {setup['context']} --memory {setup['memory']}{'' if run['chat'] else ' --raw'} "
        f"--tokens {len(run['tokens'])} --prompt {json.dumps(run['prompt'])} --check"
    )
    text = " ".join(run["text"].split())
    facts = (
        f"SmolLM2-135M, {setup['weights'].upper()} A8 {setup['kv'].upper()}: all layers and the "
        f"LM head on the Verilated `{setup['engine']}` engine with {memory}. {run['prompt_tokens']} prompt tokens, "
        f"{len(run['tokens'])} new ones; every token and every logit equals the golden device's. "
        f"{run['prefill_cycles']:,} cycles for the prompt, {sum(cycles) // len(cycles):,} per token after it."
    )
    shown = ["## Text that the hardware wrote", "", f"> {run['prompt']} **{text}**", "", facts]
    return "\n".join([*shown, "", "```sh", command, "```", ""])


def _replaced(page: str, marks: tuple[str, str], text: str) -> str:
    begin, end = page.find(marks[0]), page.find(marks[1])
    if not 0 <= begin < end:
        raise KVStrataError(
            f"README.md holds a block between {marks[0]} and {marks[1]}, and they are missing"
        )
    return page[: begin + len(marks[0])] + "\n" + text + page[end:]


def reproduction() -> str:
    """Published figures beside modelled ones: the errors, then every row."""
    from sim import others
    from sim.reproduce import reproduce, statistics, table

    outcomes, beyond = reproduce(), reproduce(others.rows())
    errors = [100 * abs(o.error) for o in beyond]
    others_line = (
        f"- {len(beyond)} figures of systems that the model was not made for: mean absolute error "
        f"{sum(errors) / len(errors):.1f}%, worst {max(errors):.1f}%"
    )
    more = (
        "Two rows contradict their paper's other figures; the arithmetic and what each miss means stand in "
        "[docs/reproduction.md](docs/reproduction.md)."
    )
    head = [
        "| source | figure | published | modelled | error | status | note |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(
        [
            "## Reproduction",
            "",
            statistics(outcomes),
            others_line,
            "",
            more,
            "",
            *head,
            *table(outcomes),
            "",
            "Other systems, on which no parameter was set:",
            "",
            *head,
            *table(beyond),
            "",
        ]
    )


def results(summary: Mapping[str, Any]) -> str:
    """Three tables: what the model said, what the RTL did, what the machine achieves."""
    generated, accuracy = summary["generated"], summary["accuracy"]
    perplexity = {row["level"]: row["perplexity"] for row in accuracy["rows"]}
    lines = [
        "## Results",
        "",
        f'SmolLM2-135M on "{generated["prompt"]}", {generated["new_tokens"]} tokens, greedy:',
        "",
    ]
    lines += ["| level | perplexity | positions as float | text |", "|---|---|---|---|"]
    for level in generated["levels"]:
        agreement = "" if level["agreement"] is None else f"{100 * level['agreement']:.0f}%"
        text = " ".join(level["text"].split()).replace("|", "\\|")
        lines.append(f"| {level['name']} | {perplexity[level['name']]:.2f} | {agreement} | {text} |")
    lines += ["", f"Real operands of layer {summary['rtl']['layer']} on Verilated RTL:", ""]
    lines += ["| block | shape | against golden | cycles | bound |", "|---|---|---|---|---|"]
    for row in summary["rtl"]["rows"]:
        exact = "bit-exact" if row["bit_exact"] else row["first_difference"]
        lines.append(
            f"| {row['name']} | {row['shape']} | {exact} | {row['cycles']:,} | {row['bound_cycles']:,.0f} |"
        )
    lines += [
        "",
        "From those cycles, 1,024 tokens in and 1,024 out, at batch 64 or the largest that a scheme can run:",
        "",
    ]
    lines += ["| model | scheme | batch | token/s | bottleneck |", "|---|---|---|---|---|"]
    for row in summary["system"]["rows"]:
        lines.append(
            f"| {row['model']} | {row['scheme']} | {row['batch']} | {row['tokens_per_s']:,.4g} | {row['bottleneck']} |"
        )
    return "\n".join(
        [
            *lines,
            "",
        ]
    )
