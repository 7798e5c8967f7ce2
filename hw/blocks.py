"""Every block that stands on its own: what `verilog` emits and `synth` measures."""

from collections.abc import Callable
from dataclasses import dataclass

from amaranth.lib import wiring

from golden.spec.engine import U280
from hw.engine import array, lane
from hw.engine.controller import Controller
from hw.engine.decoder import ChannelPlanes
from hw.engine.drain import ScaleLane
from hw.engine.sfu.fetch import Fetch, Reducer
from hw.engine.sfu.lanes import LanePair
from hw.engine.sfu.retire import GroupWriter
from hw.engine.sfu.scalars import ScalarUnit
from hw.engine.sfu.softmax import SoftmaxUnit
from hw.engine.sfu.walker import Beat, Walker


@dataclass(frozen=True)
class Block:
    """A block's constructor and the device families it is meant for."""

    make: Callable[[], wiring.Component]
    families: tuple[str, ...] = ("xcup", "xc7")


ENGINE = ("xcup",)
"""The engine is for UltraScale+ alone."""

BLOCKS: dict[str, Block] = {
    "rce_half_pair": Block(lambda: array.LanePair(array.STEP // 2), ENGINE),
    "rce_lane": Block(lambda: lane.Lane(U280.tokens), ENGINE),
    "rce_channel": Block(lambda: ChannelPlanes(U280.lanes_per_channel), ENGINE),
    "rce_output_scale": Block(ScaleLane, ENGINE),
    "engine_controller": Block(lambda: Controller(U280), ENGINE),
    "sfu_lane_pair": Block(LanePair, ENGINE),
    "sfu_scalars": Block(ScalarUnit, ENGINE),
    "sfu_softmax": Block(lambda: SoftmaxUnit(U280.vector_lanes), ENGINE),
    "sfu_walker": Block(lambda: Walker(U280), ENGINE),
    "sfu_fetch": Block(lambda: Fetch(U280, Beat(U280.vector_lanes)), ENGINE),
    "sfu_reducer": Block(lambda: Reducer(U280.vector_lanes, Beat(U280.vector_lanes)), ENGINE),
    "sfu_groups": Block(lambda: GroupWriter(U280.vector_lanes), ENGINE),
}
