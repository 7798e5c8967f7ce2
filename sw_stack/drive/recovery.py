"""Mounting a drive after a power loss: maps are rebuilt from the spare areas and the journal.

What survives: every page whose program finished. What does not: group buffers, and a page torn by the loss. A
sequence comes back with the longest prefix that all its layers, heads and both of K and V still hold, so the host
recomputes at most the tokens of one group per sequence (those that DRAM held) and appends from there.
"""

from __future__ import annotations

import numpy as np

from golden.spec.nvme import AddressMap
from golden.spec.storage import PageKind
from sw_stack.drive.flash import FlashArray
from sw_stack.drive.ftl import UNMAPPED, Ftl, FtlOptions, Sequence
from sw_stack.drive.journal import Configured, Span
from sw_stack.drive.shape import TaskShape

TOKEN_VIEWS = (PageKind.K_TOKEN, PageKind.V_TOKEN)


def mount(flash: FlashArray, options: FtlOptions | None = None) -> Ftl:
    """A firmware state over what `flash` holds; sequences are cut to their common prefix."""
    ftl = Ftl(flash, options or FtlOptions())
    configs = _replay_configs(ftl)
    if ftl.address_map is None:
        ftl.allocator.adopt(np.zeros(0, np.int64))
        return ftl
    ppns = flash.programmed()
    fields = _unpack(ftl.address_map, flash.address[ppns])
    alive = _alive(flash, ppns, fields, configs)
    ppns, fields = ppns[alive], {name: values[alive] for name, values in fields.items()}
    for task, shape in ftl.tasks.items():
        for batch in np.unique(fields["batch"][fields["task"] == task]):
            mine = (fields["task"] == task) & (fields["batch"] == batch)
            sequence = Sequence.empty(shape)
            axes = tuple(fields[name][mine] for name in ("view", "layer", "head", "group"))
            sequence.map[axes] = ppns[mine]  # ascending program number: the newest copy stays
            _cut_to_prefix(ftl, sequence, _holes(flash, task, int(batch), shape))
            ftl.sequences[task, int(batch)] = sequence
            ftl._map_bytes += shape.map_bytes
    mapped = [s.map[s.map >= 0] for s in ftl.sequences.values()]
    ftl.allocator.adopt(np.concatenate(mapped) if mapped else np.zeros(0, np.int64))
    return ftl


def _replay_configs(ftl: Ftl) -> dict[int, int]:
    """Tasks that are live after the journal, with the program number at which each was configured."""
    born: dict[int, int] = {}
    for record in ftl.flash.journal:
        if isinstance(record, Configured):
            ftl.tasks[record.task], ftl.address_map = record.shape, record.address_map
            born[record.task] = record.clock
        elif record.span.covers_task(ftl.tasks.get(record.span.task)):
            ftl.tasks.pop(record.span.task, None)
    return born


def _unpack(address_map: AddressMap, words: np.ndarray) -> dict[str, np.ndarray]:
    fields, left = {}, words.astype(np.int64)
    for name, bits in reversed(address_map.widths):
        fields[name] = left & ((1 << bits) - 1)
        left = left >> bits
    return fields


def _alive(
    flash: FlashArray, ppns: np.ndarray, fields: dict[str, np.ndarray], born: dict[int, int]
) -> np.ndarray:
    """bool per page: programmed after its task was configured and not reclaimed since."""
    number = flash.program_number[ppns]
    alive = np.zeros(len(ppns), bool)
    for task, clock in born.items():
        alive |= (fields["task"] == task) & (number > clock)
    shapes: dict[int, TaskShape] = {}
    for record in flash.journal:
        if isinstance(record, Configured):
            shapes[record.task] = record.shape
            continue
        gone = _in_span(record.span, fields, shapes[record.span.task].channel_groups)
        alive &= ~(gone & (number <= record.clock))
    return alive


def _in_span(span: Span, fields: dict[str, np.ndarray], per: int) -> np.ndarray:
    """Pages that a reclaim removed; channel pages as `Ftl.reclaim` rounds them to segments."""
    inside = fields["task"] == span.task
    for axis, start, count in (
        ("batch", span.batch, span.batches),
        ("layer", span.layer, span.layers),
        ("head", span.head, span.heads),
    ):
        inside &= (fields[axis] >= start) & (True if not count else fields[axis] < start + count)
    group, channel = fields["group"], fields["view"] == PageKind.K_CHANNEL
    if span.groups:
        end = span.group + span.groups
        tokens = (group >= span.group) & (group < end)
        segments = (group >= -(-span.group // per) * per) & (group < end // per * per)
    else:
        tokens, segments = group >= span.group, group >= span.group // per * per
    return inside & np.where(channel, segments, tokens)


def _holes(flash: FlashArray, task: int, batch: int, shape: TaskShape) -> np.ndarray:
    """bool[L, H, group]: pages that a bounded reclaim removed on purpose, so their absence loses nothing."""
    holes = np.zeros((shape.layers, shape.kv_heads, shape.groups), bool)
    for record in flash.journal:
        if isinstance(record, Configured):
            if record.task == task:
                holes[:] = False
            continue
        span = record.span
        outside = batch < span.batch or (span.batches and batch >= span.batch + span.batches)
        if span.task != task or outside:
            continue
        axes = tuple(
            slice(start, start + count if count else None)
            for start, count in (
                (span.layer, span.layers),
                (span.head, span.heads),
                (span.group, span.groups),
            )
        )
        holes[axes] = span.groups > 0
    return holes


def _cut_to_prefix(ftl: Ftl, sequence: Sequence, holes: np.ndarray) -> None:
    """Set `tokens` to the prefix that every layer, head, K and V hold; unmap what lies beyond."""
    shape, flash = sequence.shape, ftl.flash
    table = sequence.map[: len(TOKEN_VIEWS)]
    valid = np.where(table >= 0, flash.tokens[table.clip(0)], 0).astype(np.int64)
    valid[:, holes & (table < 0).all(0)] = shape.tokens_per_page
    full = valid == shape.tokens_per_page
    run = np.cumprod(full, axis=-1).sum(-1)
    at_end = np.take_along_axis(valid, np.minimum(run, shape.groups - 1)[..., None], -1)[..., 0]
    at_end = np.where(run < shape.groups, at_end, 0)
    tokens = int((run * shape.tokens_per_page + at_end).min())
    sequence.tokens[:] = min(tokens, shape.max_tokens)
    sequence.map[: len(TOKEN_VIEWS), ..., -(-tokens // shape.tokens_per_page) :] = UNMAPPED
    whole = tokens // shape.segment_tokens * shape.channel_groups
    sequence.map[PageKind.K_CHANNEL, ..., whole:] = UNMAPPED
