"""A configuration's resources as a sum of synthesised blocks.

Rule: repeated blocks are synthesised once and counted; a pair of rows is synthesised as two halves of 16 multipliers
(`LanePair(16)`, on DSP48E2 cascades) plus the adders that join their dot products; memories that a device holds in
block RAM or URAM are counted by their shape. Wiring between blocks adds nothing. Lanes make the minimum's product in
LUTs, and as many of them the scale's too as the budget of DSPs wants (`lanes_without_dsp`). Blocks of which there are
many, and the softmax unit, are synthesised for few LUTs, the others for few levels. Sources of every row are the
blocks that the engine elaborates; a LUT is one cell of Yosys' netlist, however few inputs it uses.
"""

from dataclasses import replace
from functools import partial

from golden.spec.engine import SIDE_BITS, STEP, VB_BANKS, EngineConfig
from hw.engine.array import DOT_BITS, LanePair
from hw.engine.controller import Controller
from hw.engine.decoder import ChannelPlanes, Incoming, Outgoing
from hw.engine.drain import ScaleLane
from hw.engine.lane import Lane, Multipliers
from hw.engine.matrix import Issue
from hw.engine.mem.append import AppendUnit
from hw.engine.mem.channels import BURSTS_AHEAD
from hw.engine.mem.dma import DmaUnit
from hw.engine.mem.reader import ReadChannel
from hw.engine.sfu.fetch import Fetch, Reducer
from hw.engine.sfu.lanes import LanePair as VectorLanePair
from hw.engine.sfu.retire import GroupWriter
from hw.engine.sfu.scalars import ScalarUnit
from hw.engine.sfu.softmax import SoftmaxUnit
from hw.engine.sfu.walker import Beat, Walker
from hw.flow.synth import Part, Resources, resources
from hw.lib.memories import bram36_count, uram_count

ADDR_BITS = 32
WORD_BITS = 512


DSP_BUDGET = 4497
"""DSPs of the published engine on the same board (reference: AccLLM)."""


def parts(config: EngineConfig, lanes_without_dsp: int = 0) -> list[Part]:
    """The logic of an engine, block by block."""
    channel = {
        "addr_bits": ADDR_BITS, "data_bits": WORD_BITS, "fifo_beats": config.fifo_words, "max_bursts": BURSTS_AHEAD,
    }  # fmt: skip
    return [
        Part("half pair of rows", config.lanes, partial(LanePair, STEP // 2, primitives=True), area=True),
        Part(
            "lane",
            config.lanes - lanes_without_dsp,
            partial(Lane, config.tokens, Multipliers.SCALE_IN_DSP),
            area=True,
        ),
        Part(
            "lane without DSP", lanes_without_dsp, partial(Lane, config.tokens, Multipliers.LUTS), area=True
        ),
        Part("channel planes", config.channels, partial(ChannelPlanes, config.lanes_per_channel), area=True),
        Part("word sequence", 1, partial(Incoming, config)),
        Part("step sequence", 1, partial(Outgoing, config)),
        Part("issue", 1, partial(Issue, config)),
        Part("output scale", config.vector_lanes, partial(ScaleLane), area=True),
        Part("vector lane pair", config.vector_lanes // 2, partial(VectorLanePair), area=True),
        Part("vector scalars", 1, partial(ScalarUnit)),
        Part("softmax", 1, partial(SoftmaxUnit, config.vector_lanes), area=True),
        Part("vector walker", 1, partial(Walker, config)),
        Part("vector fetch", 1, partial(Fetch, config, Beat(config.vector_lanes))),
        Part("vector reducer", 1, partial(Reducer, config.vector_lanes, Beat(config.vector_lanes))),
        Part("group writer", 1, partial(GroupWriter, config.vector_lanes)),
        Part("read channel", config.channels, partial(ReadChannel, **channel), area=True),
        Part("append unit", 1, partial(AppendUnit, config)),
        Part("DMA unit", 1, partial(DmaUnit, config)),
        Part("controller", 1, partial(Controller, config)),
    ]


def memories(config: EngineConfig) -> Resources:
    """Vector buffer in URAM, activation buffer in the kind that holds it with fewer bits wasted."""
    bank = config.vb_words // VB_BANKS
    act = 2 * (uram_count(8 * STEP, config.act_words) + uram_count(SIDE_BITS, config.act_words))
    if bank >= 4096:
        return Resources(0, 0, 0, 0.0, VB_BANKS * uram_count(32 * config.vector_lanes, bank) + act, 0, 0)
    bram = VB_BANKS * bram36_count(32 * config.vector_lanes, bank)
    bram += 2 * (bram36_count(8 * STEP, config.act_words) + bram36_count(SIDE_BITS, config.act_words))
    return Resources(0, 0, 0, bram, 0, 0, 0)


def drain_select(config: EngineConfig) -> Resources:
    """Selection of `vector_lanes` accumulators out of all lanes (a LUT per four inputs and bit), and joining adders."""
    groups = config.lanes // config.vector_lanes
    select = config.vector_lanes * 56 * -(-groups // 4) if groups > 1 else 0
    return Resources(select + config.lanes * DOT_BITS, 0, 0, 0.0, 0, 0, 0)


def _synthesised(blocks: list[Part]) -> dict[str, Resources]:
    return {p.name: resources(p.make, p.top, area=p.area).scaled(p.count) for p in blocks if p.count}


def compose(config: EngineConfig) -> dict[str, Resources]:
    """Resources by part (copies included), with `memories`, `select and join` and the `total`."""
    table = _synthesised(parts(config))
    over = sum(row.dsp for row in table.values()) - DSP_BUDGET
    if 0 < over <= config.lanes:
        table = _synthesised(parts(config, over))
    table["memories"] = memories(config)
    table["select and join"] = drain_select(config)
    total = Resources(0, 0, 0, 0.0, 0, 0, 0)
    for row in table.values():
        total = total + row
    return {**table, "total": replace(total)}
