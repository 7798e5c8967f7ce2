"""Closed-form cycle counts of the flash side; tests hold them against the RTL. Cycles are of the unit's clock."""

from collections.abc import Sequence

from golden.spec.storage import CHANNEL_BEAT_BYTES, PAGE_BYTES, PAGE_CHANNEL_BEATS
from hw.storage.nfc.filter import PageFilter


def filter_cycles(pages: int, last_beats: int) -> int:
    """From the first raw beat of `pages` pages to the last filtered beat, `last_beats` being the last page's.

    The channel delivers a beat every cycle, its pages are granted in time, the last is the oldest and the output
    is never refused: one raw beat enters per cycle whatever the marks.
    """
    tail = PageFilter.latency + last_beats - 1 if last_beats else 0
    return pages * PAGE_CHANNEL_BEATS + tail


def channel_cycles(pages: int, *, clock_mhz: int = 285, channel_mb_per_s: int = 1400) -> float:
    """The least time in which a channel moves `pages` pages over its bus."""
    return pages * PAGE_BYTES * clock_mhz / channel_mb_per_s


def stream_bound_cycles(
    pages_per_channel: Sequence[int], *, clock_mhz: int = 285, channel_mb_per_s: int = 1400
) -> float:
    """The least time for pages on several channels: that of the channel with the most."""
    return channel_cycles(max(pages_per_channel), clock_mhz=clock_mhz, channel_mb_per_s=channel_mb_per_s)


def beat_fraction(clock_mhz: int = 285, channel_mb_per_s: int = 1400) -> float:
    """Share of cycles in which a channel at its full rate delivers a beat."""
    return channel_mb_per_s / (CHANNEL_BEAT_BYTES * clock_mhz)
