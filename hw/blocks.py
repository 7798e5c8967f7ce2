"""Every block that stands on its own: what `verilog` emits and `synth` measures.

They are the parts that the engine's and the in-storage unit's resources are summed from, each on its own device family.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from golden.spec.engine import U280
from hw.engine import compose as engine
from hw.flow.synth import Part
from hw.flow.verilog import Recipe
from hw.storage import compose as storage


@dataclass(frozen=True)
class Block:
    """A block's constructor with its arguments, the device family it is meant for and what its synthesis saves."""

    make: Recipe
    family: str
    area: bool


def _blocks(prefix: str, parts: Iterable[Part], family: str) -> dict[str, Block]:
    return {f"{prefix}_{part.top}": Block(part.make, family, part.area) for part in parts}


BLOCKS: dict[str, Block] = {
    **_blocks("engine", engine.parts(U280), "xcup"),
    **_blocks("storage", storage.parts(), storage.FAMILY),
}
