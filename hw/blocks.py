"""Every block that stands on its own: what `verilog` emits and `synth` measures."""

from collections.abc import Callable
from dataclasses import dataclass

from amaranth.lib import wiring

from golden.spec.engine import U280
from hw.engine.sfu.lanes import LanePair
from hw.engine.sfu.scalars import ScalarUnit
from hw.engine.sfu.softmax import SoftmaxUnit
from hw.engine.sfu.unit import VectorUnit


@dataclass(frozen=True)
class Block:
    """A block's constructor and the device families it is meant for."""

    make: Callable[[], wiring.Component]
    families: tuple[str, ...] = ("xcup", "xc7")


ENGINE = ("xcup",)
"""The engine is for UltraScale+ alone."""

BLOCKS: dict[str, Block] = {
    "sfu_lane_pair": Block(LanePair, ENGINE),
    "sfu_scalars": Block(ScalarUnit, ENGINE),
    "sfu_softmax_8": Block(lambda: SoftmaxUnit(8), ENGINE),
    "sfu_softmax_16": Block(lambda: SoftmaxUnit(16), ENGINE),
    "sfu_vector_unit_16": Block(lambda: VectorUnit(U280), ENGINE),
}
