"""Amaranth components to Verilog text and a port list."""

import re
from dataclasses import dataclass
from typing import Any

from amaranth.back import rtlil, verilog
from amaranth.lib import wiring

from hw.flow.cache import cached_directory, content_key
from hw.lib.shared import SharedModules

TEXT_VERSION = "2"  # part of the cache key: raise it when the text made of the same RTLIL changes


@dataclass(frozen=True)
class Design:
    """A component as Verilog.

    `ports` maps a port's name, as `path__to__payload`, to `(direction, width, signed)`, direction "i" or "o".
    """

    top: str
    text: str
    ports: dict[str, tuple[str, int, bool]]

    @property
    def key(self) -> str:
        """Content hash: equal for equal Verilog."""
        return content_key(self.top, self.text)


def emit(component: wiring.Component, top: str) -> Design:
    """Convert `component` to Verilog with module name `top`.

    Source locations are left out, so the text depends on the design alone. The conversion through Yosys is
    cached by the hash of the design's RTLIL. Components placed with `hw.lib.shared.place` are one module each.
    """
    ports = _ports(component)
    modules = SharedModules()
    texts = [rtlil.convert(component, name=top, platform=modules, emit_src=False)]
    done: set[str] = set()
    while missing := [name for name in modules.components if name not in done]:
        for name in missing:
            shared = modules.components[name]
            texts.append(rtlil.convert(shared, name=name, platform=modules, emit_src=False))
        done |= set(missing)
    intermediate = "\n".join(texts)

    def build(work: Any) -> None:
        parts = [
            _compact_zeros(verilog._convert_rtlil_text(text, strip_internal_attrs=True)) for text in texts
        ]
        (work / f"{top}.v").write_text("\n".join(parts))

    directory = cached_directory("verilog", content_key(top, intermediate, TEXT_VERSION), build)
    return Design(top, (directory / f"{top}.v").read_text(), ports)


_ZERO_ROWS = re.compile(r"  initial begin\n((?: +(\S+)\[\d+\] = \d+'h0+;\n){64,})  end\n")


def _compact_zeros(text: str) -> str:
    """The same text with a loop where a large memory is cleared row by row, which tools read far faster."""

    def loop(match: re.Match[str]) -> str:
        memory, rows = match[2], match[1].count("\n")
        index = f"{memory.strip(chr(92))}_row".replace(".", "_")
        header = f"initial for ({index} = 0; {index} < {rows}; {index} = {index} + 1)"
        return f"  integer {index};\n  {header} {memory} [{index}] = 0;\n"

    return _ZERO_ROWS.sub(loop, text)


def _ports(component: wiring.Component) -> dict[str, tuple[str, int, bool]]:
    from amaranth.hdl import Shape, Value

    ports = {}
    for path, member, port in component.signature.flatten(component):
        shape = Shape.cast(member.shape) if not isinstance(port, Value) else port.shape()
        direction = "i" if member.flow is wiring.In else "o"
        ports["__".join(str(part) for part in path)] = (direction, shape.width, shape.signed)
    return ports
