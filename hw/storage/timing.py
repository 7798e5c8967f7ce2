"""Closed-form cycle counts of a kernel, held against the RTL by tests/rtl/test_storage_kernel.py, and the times
that the recurrences of a batch start from (`golden.storage.batch`).

Cycles are counted from the cycle in which the first beat is accepted to the cycle in which the last output is
valid, both included, with nothing outside the block stalling.
"""

from math import ceil

from golden.spec.storage import (
    BEAT_ELEMENTS,
    GROUP_TOKENS,
    PAGE_BEATS,
    check_head_size,
)
from hw.storage import normalise
from hw.storage.lane import APPROXIMATE_SCORE_TIME, LANES_TIME, P_STORE_LATENCY, TOTAL_TIME, score_time
from hw.storage.nfc.filter import RING_PAGES, PageFilter
from hw.storage.nfc.front import OUTSTANDING
from hw.storage.nfc.layouts import SLOTS as PAGE_SLOTS
from hw.storage.passes import AHEAD, ASKED_DEPTH, CHANNELS, SLOTS
from hw.storage.softmax import SoftmaxLane
from hw.storage.topk.timing import first_row_cycles

RESET_CYCLES = 128
"""For how long a reset is held: pipeline registers have none and run empty meanwhile, a score's in 100."""


def probability_latency(head_size: int) -> int:
    """Cycles from a K block's last beat to the first cycle that accepts its V block."""
    return 2 + score_time(head_size == 128) + SoftmaxLane.latency + GROUP_TOKENS - 1 + P_STORE_LATENCY


def attention_beats(tokens: int, head_size: int) -> int:
    """Beats of K and V of one head: K of the present tokens, V of whole groups."""
    return tokens * head_size // BEAT_ELEMENTS + ceil(tokens / GROUP_TOKENS) * head_size


def kernel_head(tokens: int, head_size: int, queries: int) -> int:
    """Dense attention of one KV head on one kernel, K one group ahead of V: K0 K1 V0 K2 V1 ...

    Beats take a cycle each; V waits for the probabilities of its group only where too few beats lie between, which
    is at both ends of the head.
    """
    check_head_size(head_size)
    groups = ceil(tokens / GROUP_TOKENS)
    slices = head_size // BEAT_ELEMENTS
    latency = probability_latency(head_size)
    now = 1 + queries * slices
    scored = []
    for group in range(groups + 1):
        if group < groups:
            now += slices * min(GROUP_TOKENS, tokens - group * GROUP_TOKENS)
            scored.append(now - 1 + latency)
        if group:
            now = max(now, scored[group - 1]) + head_size
    return now - 1 + TOTAL_TIME + 1 + normalise.cycles(queries, head_size)


def unit_times(channels: int = CHANNELS) -> dict[str, int]:
    """Fields of `golden.storage.batch.UnitTimes`, for a unit of so many flash channels."""
    scan, channel_scan = 1 << 8, 1 << 4  # entries of the histograms of argtopk and of the channels
    return {
        "slots": SLOTS,
        "ahead": AHEAD,
        "ring_beats": RING_PAGES * PAGE_BEATS,
        "ring_slots": PAGE_SLOTS,
        "pending": ASKED_DEPTH,
        "ledger": (channels + 1) * OUTSTANDING,
        "commands": OUTSTANDING,
        "descriptors": OUTSTANDING,
        "page_steps": 2,
        # registers of maps, ledger and queues
        "ask_steps": 20,
        "filter": PageFilter.latency + 1,
        # the sums settle, the selection is asked for
        "drain": LANES_TIME + 6,
        "settled": 16,
        "score": APPROXIMATE_SCORE_TIME,
        "probability_64": probability_latency(64),
        "probability_128": probability_latency(128),
        "total": TOTAL_TIME + 1,
        "normalise_query": normalise.cycles(1, 0) - normalise.cycles(0, 0),
        "normalise_fixed": normalise.cycles(0, 0),
        # the sum's pipeline, and a quotient bit per cycle
        "alpha": 60,
        # a square root
        "scale": 80,
        "topk_scan": scan,
        "topk_pass": first_row_cycles(0, 2) - first_row_cycles(0, 1) - scan,
        "topk_fixed": first_row_cycles(0, 1) - scan,
        "channel_scan": channel_scan,
    }
