"""One flash channel command by command: a bus that dies share, and dies that sense.

The loop that page fidelity runs for every channel (`sim.devices.flash_pages`), in bare numbers, so that the limits of
`sim.devices.flash` can ask it for the one rate that has no closed form: `unsteady_round_us`.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Sensing:
    """Array time of a read: mean +- spread by page type (even steps where there are more than two), and whole re-reads
    by chance."""

    read_us: float
    spread_us: float
    retry_rate: float
    retry_max: int
    page_types: int = 2

    @property
    def fixed(self) -> bool:
        """Whether every read takes the same time."""
        return not self.spread_us and not self.retry_rate

    @property
    def mean_us(self) -> float:
        """Mean, retries included."""
        return self.read_us * (1 + sum(self.retry_rate**n for n in range(1, self.retry_max + 1)))

    def times_us(self, rng: random.Random) -> Callable[[], float]:
        """A generator of array times."""
        if self.fixed:
            return lambda: self.read_us
        chance, types = rng.random, self.page_types
        array = [self.read_us + self.spread_us * (1 - 2 * n / (types - 1)) for n in range(types)]

        def draw() -> float:
            sense = array[int(chance() * types)]
            tries = 1
            while tries <= self.retry_max and chance() < self.retry_rate:
                tries += 1
            return sense * tries

        return draw


@dataclass(frozen=True)
class Bus:
    """Times of a command and of its data on the bus, and who goes first; `cached`: dies sense while data wait."""

    command_us: float
    out_us: float
    commands_first: bool
    cached: bool = False


def run_channel(bus: Bus, queues: list[int], sense: Callable[[], float], latencies: list[float]) -> float:
    """Until the queue of each die (commands) is empty; the end in microseconds. Latencies are appended."""
    tcmd, out, cached, commands_first = bus.command_us, bus.out_us, bus.cached, bus.commands_first
    left, pending = list(queues), sum(queues)
    waiting = deque(die for die, queued in enumerate(left) if queued)
    asked, sensed = [0.0] * len(left), [0.0] * len(left)
    ready: list[tuple[float, int]] = []
    free = 0.0
    push, pop, record = heapq.heappush, heapq.heappop, latencies.append
    while pending:
        if waiting and (commands_first or not (ready and ready[0][0] <= free)):
            die = waiting.popleft()
            asked[die] = free
            free += tcmd
            at = free + sense()
            # With cache reads the die senses its next page as soon as this one has moved to the cache register.
            sensed[die] = at + sense() if cached else 0.0
            push(ready, (at, die))
            continue
        at, die = pop(ready)
        free = (at if at > free else free) + out
        record(free - asked[die])
        pending -= 1
        left[die] -= 1
        if left[die] and cached:
            asked[die] = free
            free += tcmd
            moved = max(sensed[die], free)
            sensed[die] = moved + sense()
            push(ready, (moved, die))
        elif left[die]:
            waiting.append(die)
    return free


def round_us(bus: Bus, dies: int, sensing: Sensing) -> float:
    """Time in which every die of a channel gives one command's data, no other limit binding."""
    if bus.cached:
        return max(sensing.mean_us, bus.command_us + bus.out_us)
    alone = bus.command_us + sensing.mean_us
    if bus.commands_first:
        return alone + bus.out_us
    # Commands that take long stagger the dies as much as unequal reads do.
    if sensing.fixed and dies * bus.command_us <= 0.5 * sensing.mean_us:
        return alone + dies * bus.out_us
    return unsteady_round_us(bus, dies, sensing)


COMMANDS, LEAST_ROUNDS = 4096, 256
"""Commands of a steady run, and per die: a few dies need more rounds until all ways to be out of step were seen."""


@lru_cache(maxsize=1024)
def unsteady_round_us(bus: Bus, dies: int, sensing: Sensing) -> float:
    """Mean time in which every die of a channel gives one command's data, where data-outs go before commands.

    With equal array times the dies fall into step: command + sense + `dies` data-outs. Page types and retries take them
    out of step, so that some sense while others use the bus, and a late die holds up nobody while the bus is busy. How
    far that goes depends on when groups of dies meet again, for which no closed form is known: the channel is run.
    """
    sense, rounds = sensing.times_us(random.Random(0)), max(LEAST_ROUNDS, COMMANDS // dies)
    # The last commands end one by one: two runs of different length leave start and end out.
    short, long = (run_channel(bus, [n] * dies, sense, []) for n in (rounds // 8, rounds))
    return (long - short) / (rounds - rounds // 8)
