"""Logic depth of a mapped netlist: the longest path between registers, in LUT levels."""

import json
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

# Levels by cell type. A carry chain costs one level to enter and nothing to travel (its cells are an order of
# magnitude faster than a LUT with its routing); wide muxes sit in the LUT's own slice.
_LEVELS = {
    **{f"LUT{n}": 1 for n in range(1, 7)},
    "INV": 0,
    "MUXF7": 0,
    "MUXF8": 0,
    "MUXF9": 0,
    "CARRY4": 1,
    "CARRY8": 1,
}
_UNREGISTERED_DSP_LEVELS = 5  # about 2.5 ns through multiplier and adder, at 0.5 ns for a LUT and its routing
_CHAIN_PORTS = {"CI", "CIN"}
_CLOCKED_RAM_PORTS = ("DI", "D0", "D1", "WE", "WCLK")  # written at the edge; a read address is a path


def logic_levels(netlist: Path, top: str) -> int:
    """Longest combinational path of module `top` in a Yosys JSON netlist of Xilinx cells.

    Registers, block memories and DSPs with a register in or right behind them end paths. A distributed memory
    read is one level, a DSP without any register `_UNREGISTERED_DSP_LEVELS`.
    """
    cells = json.loads(netlist.read_text())["modules"][top]["cells"]
    readers: dict[int, set[str]] = defaultdict(set)
    for cell in cells.values():
        for bit in _bits(cell, "input"):
            readers[bit].add(cell["type"])
    weight = {name: w for name, cell in cells.items() if (w := _weight(cell, readers)) is not None}
    driver = {bit: name for name in weight for bit in _bits(cells[name], "output")}
    sources: dict[str, set[tuple[str, bool]]] = defaultdict(set)
    for name in weight:
        for port, bits in _ports(cells[name], "input"):
            clocked = port in {"D", "CE"} or port.startswith(_CLOCKED_RAM_PORTS)
            if cells[name]["type"].startswith(("RAM", "SRL")) and clocked:
                continue
            sources[name] |= {(driver[bit], port in _CHAIN_PORTS) for bit in bits if bit in driver}
    arrival: dict[str, int] = {}
    for name in TopologicalSorter({name: {s for s, _ in sources[name]} for name in weight}).static_order():
        own = weight[name]
        through = [arrival[s] + (0 if chain else own) for s, chain in sources[name]]
        arrival[name] = max([own, *through])
    return max(arrival.values(), default=0)


def _weight(cell: dict[str, Any], readers: dict[int, set[str]]) -> int | None:
    kind = cell["type"]
    if kind in _LEVELS:
        return _LEVELS[kind]
    if kind.startswith(("RAM32", "RAM64", "RAM128", "RAM256", "RAM512", "SRL")):
        return 1
    if kind.startswith("DSP48"):
        registers = ("PREG", "MREG", "AREG", "BREG")
        packed = any(int(cell["parameters"].get(r, "0"), 2) for r in registers)
        if not packed and not _feeds_registers_only(cell, readers):
            return _UNREGISTERED_DSP_LEVELS
    return None


def _feeds_registers_only(cell: dict[str, Any], readers: dict[int, set[str]]) -> bool:
    """Whether the register behind a DSP could sit inside it; Yosys does not pack it on UltraScale+."""
    return all(kind.startswith("FD") for bit in _bits(cell, "output") for kind in readers[bit])


def _ports(cell: dict[str, Any], direction: str) -> list[tuple[str, list[int]]]:
    found = cell["port_directions"].items()
    return [
        (port, [b for b in cell["connections"][port] if isinstance(b, int)])
        for port, d in found
        if d == direction
    ]


def _bits(cell: dict[str, Any], direction: str) -> list[int]:
    return [bit for _, bits in _ports(cell, direction) for bit in bits]
