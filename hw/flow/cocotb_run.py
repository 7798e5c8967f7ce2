"""cocotb tests on a Verilated component, with the build cached by content."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from amaranth.lib import wiring
from cocotb_tools.check_results import get_results
from cocotb_tools.runner import get_runner

from golden.spec import KVStrataError
from hw.flow.cache import build_dir, cached_directory, content_key
from hw.flow.verilator import environment, link_flags, waiver_text
from hw.flow.verilog import Design, Recipe, emit

OPTIMISATION = "-O1"
"""A run spends most of its time in Python: a model at -O2 takes longer to compile than it saves."""


@contextlib.contextmanager
def _patched_environment() -> Iterator[None]:
    saved = dict(os.environ)
    os.environ.update(environment(OPTIMISATION))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def build(design: Design) -> Path:
    """Verilate `design` for cocotb and return the build directory.

    Of its signals tests reach the ports alone: a model in which every signal can be read and written is twice as long
    to compile and slower to run.
    """
    ports = (
        f'public_flat_rw -module "{design.top}" -var "{port}"\n' for port in ("clk", "rst", *design.ports)
    )
    control = waiver_text() + "".join(ports)
    flags = ["-O3", "--x-assign", "fast", "-Wno-fatal", "-j", "2", "--no-public-flat-rw"]

    def make(work: Path) -> None:
        source, waivers = work / f"{design.top}.v", work / "waivers.vlt"
        source.write_text(design.text)
        waivers.write_text(control)
        with _patched_environment():
            get_runner("verilator").build(
                sources=[waivers, source],
                hdl_toplevel=design.top,
                build_dir=work,
                build_args=[*flags, *link_flags()],
                timescale=("1ns", "1ps"),
                always=True,
                log_file=work / "build.log",
            )

    try:
        return cached_directory("cocotb", content_key(design.text, control, OPTIMISATION, *flags), make)
    except SystemExit as error:
        raise KVStrataError(
            f"Verilating {design.top} for cocotb failed with exit code {error.code}"
        ) from error


def run(
    component: wiring.Component | Recipe,
    top: str,
    test_module: str,
    *,
    seed: int = 1,
    extra_env: Mapping[str, str] | None = None,
    test_filter: str | None = None,
) -> int:
    """Run the cocotb tests of `test_module` on `component` and return how many passed.

    `test_module` is importable by name from `sys.path` or the working directory. `extra_env` reaches the tests
    through `os.environ`; put parameters there. The seed is cocotb's, so that a failure replays.

    Raises `KVStrataError` naming the log if a test fails or if none ran.
    """
    design = emit(component, top)
    directory = build(design)
    results_dir = (
        build_dir() / "cocotb-results" / f"{test_module.rsplit('.', 1)[-1]}-{design.key}-{os.getpid()}"
    )
    shutil.rmtree(results_dir, ignore_errors=True)
    results_dir.mkdir(parents=True)
    log = results_dir / "run.log"
    with _patched_environment(), contextlib.redirect_stdout(io.StringIO()):
        try:
            results = get_runner("verilator").test(
                test_module=test_module,
                hdl_toplevel=top,
                hdl_toplevel_lang="verilog",
                build_dir=directory,
                test_dir=results_dir,
                results_xml=str(results_dir / "results.xml"),
                seed=seed,
                extra_env=dict(extra_env or {}),
                test_filter=test_filter,
                log_file=log,
            )
        except SystemExit as error:
            raise KVStrataError(f"cocotb run of {test_module} on {top} failed: {_tail(log)}") from error
    total, failed = get_results(Path(results))
    if failed or not total:
        raise KVStrataError(
            f"cocotb run of {test_module} on {top}: {failed} of {total} tests failed: {_tail(log)}"
        )
    shutil.rmtree(results_dir)
    return total


def _tail(log: Path) -> str:
    if not log.is_file():
        return "no log was written"
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    wanted = [line for line in lines if "Error" in line or "assert" in line or "failed" in line]
    return f"{log}\n" + "\n".join((wanted or lines)[-25:])
