"""FTL firmware model: token- and channel-indexed maps, group buffers, striping, append-only writes, reclaim.

Letters as in `shape`: L layers, H KV heads, dh head size, g tokens per token page. A sequence is (task, batch).
Every operation works on all heads of a layer at once, so its cost in Python is a few array calls.

Commands are atomic: pages are programmed first and mapped last, so a command that fails (drive full, write fault)
or loses power leaves every earlier token where it was. docs/ftl.md states the guarantees; `recovery` mounts a
drive after a power loss.

The channel-indexed copy of K is built when its segment is complete, by reading the token pages back: buffering it
in DRAM, as the published drive would have to, takes a segment of K per head, layer and sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from golden.spec.nvme import AddressMap, LogicalAddress
from golden.spec.storage import PageKind
from golden.storage.layout import place
from sw_stack.drive import shape as pages
from sw_stack.drive.allocate import Allocator
from sw_stack.drive.errors import (
    AddressOutOfRange,
    ContextFull,
    InvalidField,
    NotConfigured,
    Unmapped,
    UnrecoveredRead,
)
from sw_stack.drive.flash import FlashArray
from sw_stack.drive.journal import Configured, Reclaimed, Span
from sw_stack.drive.shape import VIEWS, TaskShape

UNMAPPED = -1


@dataclass(frozen=True)
class FtlOptions:
    """Firmware parameters; the defaults are assumptions STK-01 to STK-03."""

    dram_bytes: int = 2 << 30
    free_threshold: float = 0.10
    erases_per_idle: int = 64


@dataclass
class Sequence:
    """One sequence: maps int32[view, L, H, group] (UNMAPPED where nothing is), tokens held per layer."""

    shape: TaskShape
    map: np.ndarray
    tokens: np.ndarray
    last_use: int = 0

    @classmethod
    def empty(cls, shape: TaskShape) -> Sequence:
        """A sequence without tokens."""
        size = (VIEWS, shape.layers, shape.kv_heads, shape.groups)
        return cls(shape, np.full(size, UNMAPPED, np.int32), np.zeros(shape.layers, np.int64))


@dataclass
class FtlCounters:
    """Work beyond the pages that the host asked for."""

    group_operations: int = 0
    spilled_pages: int = 0
    transposed_pages: int = 0
    skipped_segments: int = 0
    rebuilt_pages: int = 0


BufferKey = tuple[int, int, int]


@dataclass
class Ftl:
    """The firmware's state over one flash array. Errors: the classes of `errors`; state survives each of them."""

    flash: FlashArray
    options: FtlOptions = field(default_factory=FtlOptions)
    counters: FtlCounters = field(default_factory=FtlCounters)

    def __post_init__(self) -> None:
        self.allocator = Allocator(self.flash)
        self.tasks: dict[int, TaskShape] = {}
        self.sequences: dict[tuple[int, int], Sequence] = {}
        self.address_map: AddressMap | None = None
        self.buffers: OrderedDict[BufferKey, np.ndarray | None] = OrderedDict()
        self._buffer_bytes = self._map_bytes = 0
        self._clock = 0

    # --- configuration
    def configure(self, task: int, shape: TaskShape, address_map: AddressMap) -> None:
        """Open a task, dropping what an earlier task of that number held.

        InvalidField for an address map that is too narrow or differs from that of a live task, and for a shape
        whose group buffer does not fit the DRAM.
        """
        live = [t for t in self.tasks if t != task]
        if live and address_map != self.address_map:
            raise InvalidField(14, f"all live tasks share one address map; got {address_map}")
        needed = shape.address_map(1)
        for name in ("layer_bits", "head_bits", "group_bits"):
            if getattr(address_map, name) < getattr(needed, name):
                raise InvalidField(
                    14, f"{name} must be at least {getattr(needed, name)} for this shape; "
                    f"got {getattr(address_map, name)}"
                )  # fmt: skip
        if task >= 1 << address_map.task_bits:
            raise InvalidField(10, f"the address map has {address_map.task_bits} task bits; got task {task}")
        if shape.buffer_bytes + shape.map_bytes > self.options.dram_bytes:
            raise InvalidField(
                12, f"one sequence needs {shape.buffer_bytes + shape.map_bytes} bytes of drive DRAM; "
                f"got {self.options.dram_bytes}"
            )  # fmt: skip
        if task in self.tasks:
            self.reclaim(Span(task))
        self.tasks[task], self.address_map = shape, address_map
        self.flash.journal.append(Configured(self.flash.now(), task, shape, address_map))

    def sequence(self, task: int, batch: int) -> Sequence:
        """The sequence, created empty on first use."""
        shape = self.shape_of(task)
        assert self.address_map is not None
        if not 0 <= batch < 1 << self.address_map.batch_bits:
            raise AddressOutOfRange(batch)
        if (task, batch) not in self.sequences:
            self._make_room(shape.map_bytes, Unmapped(batch))
            self.sequences[task, batch] = Sequence.empty(shape)
            self._map_bytes += shape.map_bytes
        self._clock += 1
        sequence = self.sequences[task, batch]
        sequence.last_use = self._clock
        return sequence

    def existing(self, task: int, batch: int) -> Sequence:
        """The sequence; NotConfigured, or Unmapped when it never held a token."""
        self.shape_of(task)
        if (task, batch) not in self.sequences:
            raise Unmapped(batch)
        return self.sequence(task, batch)

    def shape_of(self, task: int) -> TaskShape:
        """Shape of a configured task; NotConfigured."""
        if task not in self.tasks:
            raise NotConfigured(task)
        return self.tasks[task]

    def address(self, view: PageKind, task: int, batch: int, layer: int, head: int, group: int) -> int:
        """The 32-bit logical address of a page."""
        assert self.address_map is not None
        return self.address_map.pack(LogicalAddress(view, task, batch, layer, head, group))

    # --- appending
    def append(self, task: int, batch: int, layer: int, tokens: int, kv: np.ndarray | None) -> int:
        """Append `tokens` of all heads to one layer; tokens held afterwards.

        kv uint16[2, H, tokens, dh] (K, then V), or None when the flash keeps no data. Full pages are programmed,
        the rest waits in the group buffer. Raises ContextFull, DriveFull, WriteFault, UnrecoveredRead.
        """
        sequence = self.sequence(task, batch)
        shape, held = sequence.shape, self._held(sequence, layer)
        if held + tokens > shape.max_tokens:
            raise ContextFull(held + tokens)
        old, total = held % shape.tokens_per_page, held % shape.tokens_per_page + tokens
        full, rest = divmod(total, shape.tokens_per_page)
        key = (task, batch, layer)
        buffer = self._buffer(key) if old or rest else None
        stream = None
        if kv is not None:
            stream = kv if not old or buffer is None else np.concatenate([buffer[:, :, :old], kv], axis=2)
        if full:
            cut = full * shape.tokens_per_page
            self._flush(key, sequence, full, None if stream is None else stream[:, :, :cut])
            stream = None if stream is None else stream[:, :, cut:]
        if rest and buffer is not None and stream is not None:
            buffer[:, :, :rest] = stream
        elif not rest:
            self._drop_buffer(key)
        sequence.tokens[layer] += tokens
        self.counters.group_operations += 2 * shape.kv_heads * max(1, full)
        return held + tokens

    def _held(self, sequence: Sequence, layer: int) -> int:
        if not 0 <= layer < sequence.shape.layers:
            raise AddressOutOfRange(layer)
        return int(sequence.tokens[layer])

    def _flush(self, key: BufferKey, sequence: Sequence, full: int, stream: np.ndarray | None) -> None:
        """Program `full` complete groups of every head and the segments that they complete, then map them."""
        task, batch, layer = key
        shape = sequence.shape
        g0 = int(sequence.tokens[layer]) // shape.tokens_per_page
        groups = np.arange(g0, g0 + full)
        parts = [
            (PageKind.K_TOKEN, groups, None if stream is None else pages.k_token_pages(shape, stream[0])),
            (PageKind.V_TOKEN, groups, None if stream is None else pages.v_token_pages(shape, stream[1])),
        ]
        parts += self._complete_segments(sequence, layer, g0, full, stream)
        self._program(key, sequence, parts, shape.tokens_per_page)

    def _complete_segments(
        self, sequence: Sequence, layer: int, g0: int, full: int, stream: np.ndarray | None
    ) -> list[tuple[PageKind, np.ndarray, np.ndarray | None]]:
        """The channel pages of segments that end within groups [g0, g0 + full)."""
        shape = sequence.shape
        per = shape.channel_groups
        first, last = g0 // per, (g0 + full) // per
        if first == last:
            return []
        before = np.arange(first * per, g0)
        ppns = sequence.map[PageKind.K_TOKEN, layer][:, before]
        old, failed = self.flash.read(ppns.clip(0).ravel())
        if (ppns < 0).any() or failed.any():
            # Part of the segment is gone: its channel pages stay unmapped, token pages still serve what is left.
            self.counters.skipped_segments += 1
            first, before = first + 1, before[:0]
            ppns, old = ppns[:, :0], old[:0]
        segments = np.arange(first * per, last * per)
        if not len(segments):
            return []
        self.counters.transposed_pages += shape.kv_heads * len(segments)
        if stream is None:
            return [(PageKind.K_CHANNEL, segments, None)]
        skip = max(0, first * per - g0) * shape.tokens_per_page
        new = stream[0][:, skip : (last * per - g0) * shape.tokens_per_page]
        k = pages.k_from_token_pages(shape, old.reshape(shape.kv_heads, len(before), shape.page_bytes))
        whole = np.concatenate([k, new], axis=1)
        return [(PageKind.K_CHANNEL, segments, pages.k_channel_pages(shape, whole))]

    def _program(
        self,
        key: BufferKey,
        sequence: Sequence,
        parts: list[tuple[PageKind, np.ndarray, np.ndarray | None]],
        tokens: int,
    ) -> None:
        """Program parts (view, groups, pages uint8[H, groups, bytes]) of all heads in one go, then map them."""
        task, batch, layer = key
        heads = np.arange(sequence.shape.kv_heads)[:, None]
        n = sum(heads.size * len(groups) for _, groups, _ in parts)
        slots = np.concatenate([self.stripe(sequence.shape, v, batch, heads, g).ravel() for v, g, _ in parts])
        base = [self.address(view, task, batch, layer, 0, 0) for view, _, _ in parts]
        assert self.address_map is not None
        shift = self.address_map.group_bits
        address = np.concatenate(
            [(b | heads << shift | g).ravel() for b, (_, g, _) in zip(base, parts, strict=True)]
        )
        data = None
        if self.flash.data is not None:
            data = np.concatenate([p.reshape(-1, p.shape[-1]) for _, _, p in parts if p is not None])
        ppns = self.allocator.write(
            task, slots, address.astype(np.uint32), np.full(n, tokens, np.uint16), data
        )
        at = 0
        for view, groups, _ in parts:
            count = heads.size * len(groups)
            self._map(sequence, view, layer, groups, ppns[at : at + count].reshape(heads.size, -1))
            at += count

    def _map(
        self, sequence: Sequence, view: PageKind, layer: int, groups: np.ndarray, ppns: np.ndarray
    ) -> None:
        table = sequence.map[view, layer]
        old = table[:, groups]
        table[:, groups] = ppns
        self.allocator.release(old[old >= 0], sequence.last_use)

    def stripe(
        self, shape: TaskShape, view: PageKind, batch: int, head: np.ndarray, group: np.ndarray
    ) -> np.ndarray:
        """Stripe slot (die index) of pages, broadcast over head and group: the golden layout's rule."""
        g = self.flash.geometry
        channel, die = place(
            view,
            batch * shape.kv_heads + head,
            group,
            groups=shape.channel_groups,
            channels=g.channels,
            arrays=g.dies_per_channel,
        )
        return channel + g.channels * die

    # --- group buffers
    @property
    def dram_used_bytes(self) -> int:
        """Maps and group buffers."""
        return self._buffer_bytes + self._map_bytes

    def _buffer(self, key: BufferKey) -> np.ndarray | None:
        """The group buffer of a layer, brought back from its spilled pages where need be; most recently used."""
        if key not in self.buffers:
            sequence = self.sequences[key[:2]]
            self._make_room(sequence.shape.buffer_bytes, InvalidField(12))
            self.buffers[key] = self._load_tail(key, sequence)
            self._buffer_bytes += sequence.shape.buffer_bytes
        self.buffers.move_to_end(key)
        return self.buffers[key]

    def _load_tail(self, key: BufferKey, sequence: Sequence) -> np.ndarray | None:
        shape, layer = sequence.shape, key[2]
        group, valid = divmod(int(sequence.tokens[layer]), shape.tokens_per_page)
        if self.flash.data is None:
            return None
        buffer = np.zeros((2, shape.kv_heads, shape.tokens_per_page, shape.head_size), np.uint16)
        if valid:
            for view, unpack in (
                (PageKind.K_TOKEN, pages.k_from_token_pages),
                (PageKind.V_TOKEN, pages.v_from_token_pages),
            ):
                data = self.read(*key, view, slice(None), np.array([group]))
                buffer[view] = unpack(shape, data)
        return buffer

    def _make_room(self, size_bytes: int, otherwise: Exception) -> None:
        """Spill least recently used group buffers until `size_bytes` fit; raises `otherwise` if they never do."""
        while self.dram_used_bytes + size_bytes > self.options.dram_bytes:
            if not self.buffers:
                raise otherwise
            self.spill(next(iter(self.buffers)))

    def spill(self, key: BufferKey) -> None:
        """Program a partly filled group and free its buffer; the page is superseded once the group is full."""
        sequence = self.sequences[key[:2]]
        shape = sequence.shape
        group, valid = divmod(int(sequence.tokens[key[2]]), shape.tokens_per_page)
        buffer = self.buffers[key]
        if valid:
            at = np.array([group])
            k, v = (None, None) if buffer is None else buffer
            parts = [
                (PageKind.K_TOKEN, at, None if k is None else pages.k_token_pages(shape, k)),
                (PageKind.V_TOKEN, at, None if v is None else pages.v_token_pages(shape, v)),
            ]
            self._program(key, sequence, parts, valid)
            self.counters.spilled_pages += 2 * shape.kv_heads
        self._drop_buffer(key)

    def spill_all(self) -> None:
        """Program every partly filled group (an orderly shutdown)."""
        for key in list(self.buffers):
            self.spill(key)

    def _drop_buffer(self, key: BufferKey) -> None:
        if key in self.buffers:
            del self.buffers[key]
            self._buffer_bytes -= self.sequences[key[:2]].shape.buffer_bytes

    # --- reading
    def resolve(
        self,
        task: int,
        batch: int,
        layer: int,
        view: PageKind,
        heads: slice | np.ndarray,
        groups: slice | np.ndarray,
    ) -> np.ndarray:
        """Physical pages int32[heads, groups]; UNMAPPED where nothing is. Raises AddressOutOfRange, Unmapped
        for a sequence that does not exist."""
        sequence = self.existing(task, batch)
        self._held(sequence, layer)
        found = sequence.map[view, layer][heads][:, groups]
        self.counters.group_operations += found.size
        return found

    def read(
        self,
        task: int,
        batch: int,
        layer: int,
        view: PageKind,
        heads: slice | np.ndarray,
        groups: np.ndarray,
    ) -> np.ndarray:
        """Page images uint8[heads, groups, page_bytes]; pages that ECC cannot save are rebuilt from K's other copy.

        Raises Unmapped or UnrecoveredRead with the logical address of the first page that cannot be had.
        """
        ppns = self.resolve(task, batch, layer, view, heads, groups)
        sequence = self.sequences[task, batch]
        head_numbers = np.arange(sequence.shape.kv_heads)[heads]
        missing = np.argwhere(ppns < 0)
        if len(missing):
            h, g = missing[0]
            raise Unmapped(self.address(view, task, batch, layer, int(head_numbers[h]), int(groups[g])))
        data, failed = self.flash.read(ppns.ravel())
        data = data.reshape(*ppns.shape, data.shape[-1])
        for h, g in np.argwhere(failed.reshape(ppns.shape)):
            head, group = int(head_numbers[h]), int(groups[g])
            data[h, g] = self._rebuild((task, batch, layer), sequence, view, head, group)
        return data

    def _rebuild(
        self, key: BufferKey, sequence: Sequence, view: PageKind, head: int, group: int
    ) -> np.ndarray:
        """Image of an unreadable K page from the other orientation of its segment, programmed anew."""
        lost = UnrecoveredRead(self.address(view, *key, head, group))
        if view is PageKind.V_TOKEN:
            raise lost
        shape = sequence.shape
        other = PageKind.K_TOKEN if view is PageKind.K_CHANNEL else PageKind.K_CHANNEL
        first = group // shape.channel_groups * shape.channel_groups
        ppns = sequence.map[other, key[2], head, first : first + shape.channel_groups]
        if (ppns < 0).any():
            raise lost
        images, failed = self.flash.read(ppns)
        if failed.any():
            raise lost
        if view is PageKind.K_TOKEN:
            image = pages.k_token_pages(shape, pages.k_from_channel_pages(shape, images))
        else:
            image = pages.k_channel_pages(shape, pages.k_from_token_pages(shape, images))
        page = image[group - first]
        slot = self.stripe(shape, view, key[1], np.array([head]), np.array([group]))
        address = np.array([self.address(view, *key, head, group)], np.uint32)
        full = np.array([shape.tokens_per_page], np.uint16)
        new = self.allocator.write(key[0], slot, address, full, page[None])
        old = sequence.map[view, key[2], head, group]
        sequence.map[view, key[2], head, group] = new[0]
        self.allocator.release(np.array([old]), sequence.last_use)
        self.counters.rebuilt_pages += 1
        return page

    def tail(self, task: int, batch: int, layer: int) -> np.ndarray | None:
        """uint16[2, H, valid, dh] of the tokens after the last full group, None when there are none."""
        sequence = self.existing(task, batch)
        valid = self._held(sequence, layer) % sequence.shape.tokens_per_page
        if not valid:
            return None
        key = (task, batch, layer)
        buffer = self.buffers[key] if key in self.buffers else self._load_tail(key, sequence)
        return None if buffer is None else buffer[:, :, :valid]

    # --- reclaiming
    def reclaim(self, span: Span) -> int:
        """Invalidate a rectangle; pages released. Space is erased later, in `idle` or when an append needs it.

        A span to the end of the token axis (`groups` = 0) cuts the sequences there and must cover all heads;
        a bounded one leaves a hole. InvalidField, NotConfigured.
        """
        shape = self.shape_of(span.task)
        if span.groups == 0 and (span.head or span.heads not in (0, shape.kv_heads)):
            raise InvalidField(
                12, f"a cut covers all {shape.kv_heads} heads; got {span.heads} from {span.head}"
            )
        self.flash.journal.append(Reclaimed(self.flash.now(), span))
        whole = span.covers_sequences(shape)
        released = 0
        for task, batch in list(self.sequences):
            if task != span.task or not _within(batch, span.batch, span.batches):
                continue
            released += self._reclaim_sequence((task, batch), span)
            if whole:
                self._map_bytes -= shape.map_bytes
                del self.sequences[task, batch]
        if span.covers_task(shape):
            self.allocator.close_task(span.task, self._clock)
            del self.tasks[span.task]
        self.counters.group_operations += released
        return released

    def _reclaim_sequence(self, key: tuple[int, int], span: Span) -> int:
        sequence = self.sequences[key]
        shape = sequence.shape
        layers = np.arange(shape.layers)[_axis(span.layer, span.layers)]
        heads = _axis(span.head, span.heads)
        per = shape.channel_groups
        if span.groups:
            token_groups = slice(span.group, span.group + span.groups)
            channel_groups = slice(-(-span.group // per) * per, (span.group + span.groups) // per * per)
        else:
            token_groups = slice(span.group, None)
            channel_groups = slice(span.group // per * per, None)
        released = []
        for layer in layers:
            if span.groups == 0:
                self._cut(key, sequence, int(layer), span.group)
            table = sequence.map[:, layer]
            for view, groups in (
                (PageKind.K_TOKEN, token_groups),
                (PageKind.V_TOKEN, token_groups),
                (PageKind.K_CHANNEL, channel_groups),
            ):
                released.append(table[view, heads, groups].ravel().copy())
                table[view, heads, groups] = UNMAPPED
        ppns = np.concatenate(released)
        ppns = ppns[ppns >= 0]
        self.allocator.release(ppns, sequence.last_use)
        return len(ppns)

    def _cut(self, key: tuple[int, int], sequence: Sequence, layer: int, group: int) -> None:
        keep = min(int(sequence.tokens[layer]), group * sequence.shape.tokens_per_page)
        if keep < sequence.tokens[layer]:
            self._drop_buffer((*key, layer))
        sequence.tokens[layer] = keep

    def idle(self) -> int:
        """Let the drive use idle time: erase reclaimed blocks if free space is below the threshold."""
        threshold = int(self.options.free_threshold * self.flash.geometry.blocks)
        return self.allocator.idle(threshold, self.options.erases_per_idle)


def _axis(start: int, count: int) -> slice:
    return slice(start, start + count if count else None)


def _within(value: int, start: int, count: int) -> bool:
    return start <= value and (not count or value < start + count)
