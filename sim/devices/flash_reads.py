"""Time of one read on idle flash: even reads that are striped, and selections whose pages lie on random dies.

A die gives the pages of a command per round (`flash_channel.round_us`). The last round ends when the dies that take
part in it have had the bus one after the other; retries and page types hold up the unluckiest die. A selection ends
with its fullest die, whose retries count as further pages, or with its fullest channel. Large reads come to the limits
of `sim.devices.flash`; small ones are far from them. Expectations, held against the page engine by tests.
"""

from __future__ import annotations

import math
from functools import lru_cache

from sim.describe.devices import Flash
from sim.devices.flash import bus_of, planes, sensing
from sim.devices.flash_channel import round_us

MANY = 40
"""Mean load from which the fullest bin is taken from the normal approximation."""
BOTH = 7
"""Power of the mean of die and channel time: where both are busy, each waits for the other a little."""


def even_read_s(flash: Flash, pages: float, drives: int = 1) -> float:
    """Seconds of `pages` pages striped over drives, channels, dies and planes."""
    own = -(-math.ceil(pages / drives) // flash.channels)
    # A read smaller than a full stripe senses only the planes that it needs.
    together = max(1, min(planes(flash), own))
    commands, dies = -(-own // together), flash.dies_per_channel
    bus, sense = bus_of(flash, together), sensing(flash)
    rounds = -(-commands // dies)
    last = commands - (rounds - 1) * dies
    # Where data-outs go first, a late die holds up nobody while the others use the bus.
    lasting = rounds if bus.commands_first or bus.cached else 1
    late = _unluckiest_us(flash, lasting, flash.channels * last)
    out = max(bus.out_us, bus.command_us)
    tail = max(last * out, (last + 1) / 2 * out + late)
    array = (rounds - 1) * round_us(bus, min(dies, commands), sense) + bus.command_us + sense.mean_us + tail
    channel = sense.mean_us + commands * (bus.command_us + bus.out_us)
    return max(array, channel) * 1e-6


def scattered_read_s(flash: Flash, pages: float, drives: int = 1) -> float:
    """Expected seconds of a selection of `pages` pages, each command of it on a die drawn at random."""
    commands, per_channel = math.ceil(pages / planes(flash)), flash.dies_per_channel
    dies, bus, sense = drives * flash.channels * per_channel, bus_of(flash, planes(flash)), sensing(flash)
    tries = commands * sense.mean_us / sense.read_us
    fullest = max(1.0, (1 + expected_excess(dies, tries)) * tries / dies)
    active = max(1.0, per_channel * (1 - (1 - 1 / dies) ** (commands - 1)))
    tail = (active + 1) / 2 * max(bus.out_us, bus.command_us) + sense.spread_us / 2 * math.sqrt(fullest)
    between = _round_of_fullest_us(flash, commands / dies / fullest)
    array = (fullest - 1) * between + bus.command_us + sense.read_us + tail
    channels = drives * flash.channels
    on_channel = (1 + expected_excess(channels, commands)) * commands / channels
    channel = sense.mean_us + on_channel * (bus.command_us + bus.out_us)
    return (array**BOTH + channel**BOTH) ** (1 / BOTH) * 1e-6


def _round_of_fullest_us(flash: Flash, filled: float) -> float:
    """Time between two commands of the fullest die; the others are `filled` as much on average, and where data-outs go
    first it waits for theirs."""
    bus, sense, dies = bus_of(flash, planes(flash)), sensing(flash), flash.dies_per_channel
    alone = bus.command_us + sense.read_us + bus.out_us
    if bus.cached:
        return max(sense.read_us, bus.command_us + bus.out_us)
    if bus.commands_first:
        return alone
    return max(alone, round_us(bus, dies, sense) - dies * bus.out_us * (1 - min(1.0, filled)))


def _unluckiest_us(flash: Flash, reads: int, dies: int) -> float:
    """What retries and page types add to the mean time of `reads` reads on the unluckiest of `dies` dies."""
    again = reads * (sensing(flash).mean_us / flash.read_us - 1)
    retries = (_most_events(dies, again) - again) * flash.read_us if again else 0.0
    steps = flash.page_types - 1
    share = sum((1 - 2 * n / steps) ** 2 for n in range(flash.page_types)) / flash.page_types
    types = min(_most_normal(dies) * math.sqrt(share * reads), reads) * flash.read_spread_us
    return math.hypot(retries, types)


@lru_cache(maxsize=1024)
def _most_normal(count: int) -> float:
    """Expected maximum of `count` standard normals, by integration over their distribution."""
    if count < 2:
        return 0.0
    step, total = 0.02, 0.0
    for n in range(-400, 400):
        below = (0.5 * (1 + math.erf((n + 0.5) * step / math.sqrt(2)))) ** count
        total += step * (1 - below if n >= 0 else -below)
    return total


@lru_cache(maxsize=4096)
def _most_events(count: int, mean: float) -> float:
    """Expected maximum of `count` Poisson counts."""
    term = below = math.exp(-mean)
    total, number = 0.0, 0
    while True:
        beyond = 1 - min(below, 1.0) ** count
        total, number = total + beyond, number + 1
        if beyond < 1e-9 and number > mean:
            return total
        term *= mean / number
        below += term


def expected_excess(bins: int, balls: float) -> float:
    """Expected (max - mean) / mean of `balls` thrown into `bins`; 0 for a single bin.

    Loads of few balls are summed (bins as independent binomials, the fullest holding at least one); those of many
    follow the mean maximum of `bins` standard normals.
    """
    if bins < 2 or balls <= 0:
        return 0.0
    mean = balls / bins
    if mean > MANY:
        return _most_normal(bins) * math.sqrt(bins / balls)
    # Between whole numbers of balls the fullest bin grows evenly.
    low = max(1, int(balls))
    share = min(max(balls - low, 0.0), 1.0)
    fullest = (1 - share) * _fullest(bins, low) + (share * _fullest(bins, low + 1) if share else 0.0)
    return max(0.0, fullest / mean - 1)


@lru_cache(maxsize=4096)
def _fullest(bins: int, balls: int) -> float:
    """Expected load of the fullest of `bins` after `balls` throws."""
    share, total, load = 1 / bins, 1.0, 0
    term = (1 - share) ** balls
    below = term
    while load < balls:
        load += 1
        term *= (balls - load + 1) / load * share / (1 - share)
        below += term
        beyond = 1 - min(below, 1.0) ** bins
        total += beyond
        if beyond < 1e-6 and load > balls * share:
            break
    return total
