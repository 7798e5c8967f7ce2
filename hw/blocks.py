"""Every block that stands on its own: what `verilog` emits and `synth` measures."""

from collections.abc import Callable
from dataclasses import dataclass

from amaranth.lib import wiring


@dataclass(frozen=True)
class Block:
    """A block's constructor and the device families it is meant for."""

    make: Callable[[], wiring.Component]
    families: tuple[str, ...] = ("xcup", "xc7")


BLOCKS: dict[str, Block] = {}
