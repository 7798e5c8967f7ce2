"""Flash behind the channels of a drive: closed-form limits (reference formulas), and what they bind on.

C channels, n dies per channel, p planes read together, P page bytes, tcmd command, tR array, tx page transfer time:

- channel:  C * p * P / (tcmd + p * tx)
- array, pipelined data-out: C * n * p * P / (tcmd + tR + p * tx)
- array, waiting data-outs served before any new command: C * n * p * P / (tcmd + tR + n * p * tx) where every
  read takes as long; page types, retries and long commands take dies out of step: `flash_channel.unsteady_round_us`
  has their round
- cache read (the next page senses while one is in the cache register): C * n * p * P / max(tR, tcmd + p * tx)

`sim.devices.flash_pages` simulates every page and must meet these in their regimes.
"""

from __future__ import annotations

import math

from sim.describe.devices import Flash
from sim.devices.flash_channel import Bus, Sensing, round_us
from sim.devices.limits import Bandwidth


def transfer_us(flash: Flash) -> float:
    """Time of one page on the channel bus."""
    return flash.page_bytes / (flash.channel_gb_per_s * 1e3)


def partial_us(flash: Flash, size_bytes: float) -> float:
    """Time on the bus of a read of part of a page: whole codewords cross it."""
    words = math.ceil(min(size_bytes, flash.page_bytes) / flash.codeword_bytes) * flash.codeword_bytes
    return min(words, flash.page_bytes) / (flash.channel_gb_per_s * 1e3)


def units(flash: Flash) -> int:
    """What senses one page at a time on its own: dies, or planes where they take separate commands."""
    return flash.channels * flash.dies_per_channel * (flash.planes_per_die if flash.independent_planes else 1)


def short_read_limits(flash: Flash, size_bytes: float) -> Bandwidth:
    """Bandwidth of random reads of `size_bytes` with every die busy: pages of a read are sensed one by one."""
    useful, per_channel = min(size_bytes, flash.page_bytes), units(flash) // flash.channels
    bus = Bus(flash.command_us, partial_us(flash, size_bytes), flash.arbitration == "pipelined")
    limits = {
        "flash array": units(flash) * useful / 1e3 / round_us(bus, per_channel, sensing(flash, size_bytes)),
        "flash channel with commands": flash.channels * useful / 1e3 / (bus.command_us + bus.out_us),
    }
    return Bandwidth("flash short read", limits)


def planes(flash: Flash) -> int:
    """Planes that one read command senses together."""
    return flash.planes_per_die if flash.multi_plane else 1


SHORT_BYTES = 4096
"""Reads up to this size may be sensed faster (`Flash.short_read_us`) and take the short path of the firmware."""


def array_us(flash: Flash, size_bytes: float | None = None) -> float:
    """Array time of a read of `size_bytes` (default: a page) without retries."""
    short = size_bytes is not None and size_bytes <= SHORT_BYTES < flash.page_bytes
    return flash.short_read_us if short and flash.short_read_us else flash.read_us


def sense_us(flash: Flash, size_bytes: float | None = None) -> float:
    """Mean array time of a read, retries included."""
    return sensing(flash, size_bytes).mean_us


def sensing(flash: Flash, size_bytes: float | None = None) -> Sensing:
    """How long this flash senses, read by read."""
    array, spread = array_us(flash, size_bytes), flash.read_spread_us
    return Sensing(array, spread, flash.retry_rate, flash.retry_max, flash.page_types)


def bus_of(flash: Flash, together: int) -> Bus:
    """A channel's bus for commands that sense `together` pages."""
    out = together * transfer_us(flash)
    return Bus(flash.command_us, out, flash.arbitration == "pipelined", flash.cache_read)


def even_round_us(flash: Flash) -> float:
    """Time in which every die of a channel gives the pages of one sequential command, no other limit binding."""
    return round_us(bus_of(flash, planes(flash)), flash.dies_per_channel, sensing(flash))


def read_limits(flash: Flash) -> Bandwidth:
    """Sustained read bandwidth of saturated sequential reads, with every limit."""
    out, per_channel = (
        planes(flash) * transfer_us(flash),
        flash.channels * planes(flash) * flash.page_bytes / 1e3,
    )
    limits = {
        "flash array": flash.dies_per_channel * per_channel / even_round_us(flash),
        "flash channel with commands": per_channel / (flash.command_us + out),
        "flash channel": per_channel / out,
    }
    return Bandwidth("flash read", limits)


def program_limits(flash: Flash) -> Bandwidth:
    """Sustained program bandwidth of saturated sequential writes, with every limit."""
    p, tx = planes(flash), transfer_us(flash)
    per_channel = flash.channels * p * flash.page_bytes / 1e3
    array = flash.dies_per_channel * per_channel / (flash.command_us + flash.program_us + p * tx)
    return Bandwidth(
        "flash program", {"flash array": array, "flash channel": per_channel / (flash.command_us + p * tx)}
    )


def program_load(flash: Flash) -> float:
    """Bytes of reading that a programmed byte takes the place of: dies and channels are busy with one or the other."""
    return read_limits(flash).gb_per_s / program_limits(flash).gb_per_s


def reclaim_s(flash: Flash, size_bytes: float) -> float:
    """Time to erase the blocks of `size_bytes` of finished jobs on an idle drive, all dies and planes at once.

    Append-only data are erased by whole blocks without copying, so this is all that reclaim costs.
    """
    block = flash.page_bytes * flash.pages_per_block
    together = flash.channels * flash.dies_per_channel * flash.planes_per_die
    return math.ceil(size_bytes / block / together) * flash.erase_us * 1e-6


def first_page_us(flash: Flash, size_bytes: float | None = None) -> float:
    """Latency of one page read (or of part of it) alone, from command to last byte on the channel."""
    size = size_bytes or flash.page_bytes
    return flash.command_us + sense_us(flash, size) + partial_us(flash, size)


def overwrite_amplification(flash: Flash, filled: float = 1.0) -> float:
    """Bytes programmed per byte of uniformly random page overwrites, `filled` of the capacity in use.

    Blocks are cleaned in order of age (Menon; Desnoyers): the share v of valid pages in the block that is cleaned
    solves (v - 1) / ln v = utilisation of the physical flash, and the amplification is 1 / (1 - v). Greedy cleaning
    is a little below. Appended data that are erased by whole blocks are never copied (SIM-WAF).
    """
    utilisation = filled * (1 - flash.spare_share)
    low, high = 1e-12, 1.0 - 1e-12
    for _ in range(60):
        v = (low + high) / 2
        low, high = (v, high) if (v - 1) / math.log(v) < utilisation else (low, v)
    return 1 / (1 - high)
