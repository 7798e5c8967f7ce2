"""Every block that stands on its own: what `verilog` emits and `synth` measures."""

from dataclasses import dataclass
from functools import partial

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
from hw.flow.verilog import Recipe


@dataclass(frozen=True)
class Block:
    """A block's constructor with its arguments and the device families it is meant for."""

    make: Recipe
    families: tuple[str, ...] = ("xcup", "xc7")


ENGINE = ("xcup",)
"""The engine is for UltraScale+ alone."""

BLOCKS: dict[str, Block] = {
    "rce_half_pair": Block(partial(array.LanePair, array.STEP // 2, primitives=True), ENGINE),
    "rce_lane": Block(partial(lane.Lane, U280.tokens, lane.Multipliers.SCALE_IN_DSP), ENGINE),
    "rce_channel": Block(partial(ChannelPlanes, U280.lanes_per_channel), ENGINE),
    "rce_output_scale": Block(partial(ScaleLane), ENGINE),
    "engine_controller": Block(partial(Controller, U280), ENGINE),
    "sfu_lane_pair": Block(partial(LanePair), ENGINE),
    "sfu_scalars": Block(partial(ScalarUnit), ENGINE),
    "sfu_softmax": Block(partial(SoftmaxUnit, U280.vector_lanes), ENGINE),
    "sfu_walker": Block(partial(Walker, U280), ENGINE),
    "sfu_fetch": Block(partial(Fetch, U280, Beat(U280.vector_lanes)), ENGINE),
    "sfu_reducer": Block(partial(Reducer, U280.vector_lanes, Beat(U280.vector_lanes)), ENGINE),
    "sfu_groups": Block(partial(GroupWriter, U280.vector_lanes), ENGINE),
}
