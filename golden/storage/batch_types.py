"""What the recurrence of a batch is about: the unit's times, the flash's, pages and jobs (`golden.storage.batch`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from golden.spec.storage import GROUP_TOKENS


@dataclass(frozen=True)
class UnitTimes:
    """Cycles of the unit's blocks, and what it holds at once."""

    slots: int
    """Jobs in the unit."""
    ahead: int
    """Approximate passes that may be asked for before the selection of the first has been."""
    ring_beats: int
    """Filtered beats that a channel holds for each kernel."""
    ring_slots: int
    """Pages of a kernel that a channel may send, or has sent and the kernel has not taken."""
    pending: int
    """Pages that wait for the firmware's answer, or for room behind it."""
    ledger: int
    """Pages of a kernel that have been asked for and not yet taken."""
    commands: int
    """Reads of a channel that wait in front of it."""
    descriptors: int
    """Reads of a channel and kernel that wait for a grant."""
    page_steps: int
    """Of a feeder, between two pages."""
    ask_steps: int
    """Between a page that a pass wants and its command."""
    filter: int
    """From a page's last raw beat to its first filtered one."""
    drain: int
    """From a block's last beat to its first score."""
    settled: int
    """Of quiet, after which an approximate pass counts as over."""
    score: int
    """From a token's turn to its key."""
    probability_64: int
    """From a K block's last beat to the V beat that may follow, head size 64."""
    probability_128: int
    total: int
    """From a head's last V beat to its sums."""
    normalise_query: int
    """Beside an element per cycle."""
    normalise_fixed: int
    alpha: int
    """From the last selected token to one query's alpha."""
    scale: int
    """Of one query's scale."""
    topk_scan: int
    """Of argtopk: one walk over the histogram."""
    topk_pass: int
    """Beside a row of keys per cycle: one pass over the keys."""
    topk_fixed: int
    channel_scan: int
    """The same for the selection of channels."""

    def probability(self, head_size: int) -> int:
        """From a K block's last beat to the V beat that may follow."""
        return self.probability_128 if head_size == 128 else self.probability_64

    def normalise(self, queries: int, head_size: int) -> int:
        """From a head's sums to its last output."""
        return queries * (self.normalise_query + head_size) + self.normalise_fixed

    def select(self, count: int, digits: int, scan: int) -> int:
        """From the last of `count` keys to the first row of marks."""
        rows = -(-count // GROUP_TOKENS)
        return digits * scan + (digits - 1) * (rows + self.topk_pass) + self.topk_fixed


class Page(NamedTuple):
    """A page to read: where it lies, and the beats that its filter passes."""

    channel: int
    array: int
    beats: int


@dataclass(frozen=True)
class BatchJob:
    """One job, dense when `blocks` is empty. `exact`: number, K page and V page of all token pages read, ascending.

    `blocks`: channel pages per block of tokens, of the channel groups `groups`. `rows`: selected tokens of each group
    of 16; `digits` that argtopk refines (`topk.timing.digits_used`).
    """

    tokens: int
    exact: Sequence[tuple[int, Page, Page]]
    blocks: Sequence[Sequence[Page]] = ()
    groups: Sequence[int] = ()
    rows: Sequence[int] = ()
    digits: int = 0


@dataclass(frozen=True)
class FlashTimes:
    """Cycles: tR, command and decoder time, bus time of a page, firmware's answer.

    A channel senses ahead of its bus among `queue` pages; an array holds `cache_read` pages beside the one it senses.
    """

    read: int
    command: int
    ecc: int
    page: float
    answer: int = 40
    cache_read: int = 1
    queue: int = 64
