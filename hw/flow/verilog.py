"""Amaranth components to Verilog text and a port list."""

import gc
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import cast

from amaranth.back import verilog
from amaranth.lib import wiring

from hw.flow.cache import ROOT, cached_directory, content_key
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


Recipe = partial[wiring.Component]
"""A component not built yet, `partial(Engine, config)`: what names its text without building it."""


def emit(component: wiring.Component | Recipe, top: str) -> Design:
    """Convert `component` to Verilog with module name `top`.

    Source locations are left out, so the text depends on the design alone. Components placed with
    `hw.lib.shared.place` are one module each.

    The text of a recipe (a class with its arguments) is cached by its name, its arguments and the hardware's
    sources: where nothing changed, nothing is built or elaborated. Arguments must be values whose `repr` tells them
    apart. A component that is built already is converted every time.
    """
    if isinstance(component, wiring.Component):
        return _convert(component, top)
    key = content_key(top, _recipe_text(component), _sources_digest(), TEXT_VERSION)

    def build(work: Path) -> None:
        design = _convert(component(), top)
        (work / "design.json").write_text(json.dumps({"text": design.text, "ports": design.ports}))

    stored = json.loads((cached_directory("designs", key, build) / "design.json").read_text())
    ports = {name: (str(way), int(width), bool(sign)) for name, (way, width, sign) in stored["ports"].items()}
    return Design(top, stored["text"], ports)


def _recipe_text(recipe: Recipe) -> str:
    """What the recipe makes, in words that are equal in every process.

    Raises ValueError for an argument that is shown by its address.
    """
    made = cast("type[wiring.Component]", recipe.func)
    text = f"{made.__module__}.{made.__qualname__}{recipe.args!r}{sorted(recipe.keywords.items())!r}"
    if " at 0x" in text:
        raise ValueError(f"a recipe's arguments must be values with a telling repr, got {text}")
    if not made.__module__.startswith("hw."):
        text += Path(inspect.getfile(made)).read_text()
    return text


@cache
def _sources_digest() -> str:
    """Hash of everything that hardware is described in: `hw/`, `golden/spec/` and Amaranth's version."""
    files = sorted((ROOT / "hw").rglob("*.py")) + sorted((ROOT / "golden" / "spec").rglob("*.py"))
    return content_key(
        version("amaranth"), *(f"{file.relative_to(ROOT)}\n{file.read_text()}" for file in files)
    )


def _convert(component: wiring.Component, top: str) -> Design:
    ports = _ports(component)
    modules = SharedModules()
    texts = [_verilog(component, top, modules)]
    done: set[str] = set()
    while missing := [name for name in modules.components if name not in done]:
        texts += [_verilog(modules.components[name], name, modules) for name in missing]
        done |= set(missing)
    return Design(top, "\n".join(texts), ports)


def _verilog(component: wiring.Component, name: str, modules: SharedModules) -> str:
    with _no_collection():
        text = verilog.convert(
            component, name=name, platform=modules, emit_src=False, strip_internal_attrs=True
        )
    return _compact_zeros(text)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No search for garbage: of the millions of objects of a conversion all are alive, and looking takes a third."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
