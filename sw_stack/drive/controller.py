"""The drive's firmware loop: fetch, execute, complete.

One handler per command. A handler that raises a `DriveError` has changed nothing; its status and detail become the
completion. In a batch, sequences fail one by one: their records say why and the others are served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from golden.spec import KVStrataError
from golden.spec.nvme import ATTEND_HEADER_BYTES, ATTEND_STATE_BYTES, AddressMap, LogicalAddress, Status
from golden.spec.storage import PageKind
from sw_stack.drive import commands as c
from sw_stack.drive import shape as pages
from sw_stack.drive.attention import AttentionUnit, GoldenUnit, HeadPages, Job
from sw_stack.drive.errors import (
    AddressOutOfRange,
    ContextFull,
    DriveError,
    InvalidField,
    NotConfigured,
    NotSequential,
    TopKRange,
    Unmapped,
)
from sw_stack.drive.ftl import Ftl
from sw_stack.drive.journal import Span
from sw_stack.drive.queue import HostMemory, QueuePair
from sw_stack.drive.shape import TaskShape


def record_bytes(shape: TaskShape, partial: bool) -> int:
    """Size of one sequence's attend record."""
    state = shape.q_heads * ATTEND_STATE_BYTES if partial else 0
    return ATTEND_HEADER_BYTES + state + shape.q_heads * shape.row_bytes


class Controller:
    """Firmware over one FTL and one attention unit; `queues` are served round robin, one command each."""

    def __init__(
        self, memory: HostMemory, queues: Iterable[QueuePair], ftl: Ftl, unit: AttentionUnit | None = None
    ) -> None:
        self.ftl, self.unit = ftl, unit or GoldenUnit()
        self._memory, self._queues = memory, list(queues)
        self._staged: dict[tuple[int, int, int], tuple[int, np.ndarray]] = {}
        self.pages_read: dict[PageKind, int] = dict.fromkeys(PageKind, 0)
        self._handlers: dict[type[c.Command], Callable[[Any, c.Submission], int]] = {
            c.Config: self._config,
            c.Read: self._read,
            c.Write: self._write,
            c.Append: self._append,
            c.Attend: self._attend,
            c.Reclaim: self._reclaim,
        }

    def process(self) -> int:
        """Execute what the queues hold; number of commands. With nothing to do the drive idles (and may erase)."""
        done = 0
        while True:
            fetched = [(queue, entry) for queue in self._queues if (entry := queue.fetch())]
            if not fetched:
                break
            for queue, entry in fetched:
                self._execute(queue, entry)
            done += len(fetched)
        if not done:
            self.ftl.idle()
        return done

    def _execute(self, queue: QueuePair, entry: bytes) -> None:
        cid = int.from_bytes(entry[2:4], "little")
        try:
            submission = c.decode(entry)
            result = self._handlers[type(submission.command)](submission.command, submission)
            queue.post(cid, Status.SUCCESS, result, 0)
        except _Partial as partial:
            queue.post(cid, Status.PARTIAL_BATCH, partial.good, partial.first)
        except DriveError as error:
            queue.post(cid, error.status, 0, error.detail & 0xFFFFFFFF)
        except KVStrataError:
            queue.post(cid, Status.INTERNAL_ERROR, 0, 0)

    # --- helpers
    def _address(self, word: int) -> tuple[LogicalAddress, TaskShape]:
        if self.ftl.address_map is None:
            raise NotConfigured(0)
        try:
            address = self.ftl.address_map.unpack(word)
        except KVStrataError:
            raise AddressOutOfRange(word) from None
        shape = self.ftl.shape_of(address.task)
        if address.layer >= shape.layers or address.head >= shape.kv_heads or address.group >= shape.groups:
            raise AddressOutOfRange(word)
        return address, shape

    def _take(self, submission: c.Submission, size: int) -> np.ndarray:
        return self._memory.gather(submission.prp1, submission.prp2, size)

    # --- commands
    def _config(self, command: c.Config, _: c.Submission) -> int:
        shape = TaskShape(
            command.layers,
            command.q_heads,
            command.kv_heads,
            command.head_size,
            command.channels_per_page,
            command.max_tokens,
            self.ftl.flash.geometry.page_bytes,
        )
        try:
            widths = AddressMap(command.batch_bits, command.layer_bits, command.head_bits, command.group_bits)
        except KVStrataError:
            raise InvalidField(14) from None
        self.ftl.configure(command.task, shape, widths)
        self._staged = {k: v for k, v in self._staged.items() if k[0] != command.task}
        return 0

    def _rectangle(self, command: c.Read | c.Write) -> tuple[LogicalAddress, TaskShape, int, int]:
        address, shape = self._address(command.address)
        heads = command.heads or shape.kv_heads - address.head
        groups = command.groups or shape.groups - address.group
        if address.head + heads > shape.kv_heads or address.group + groups > shape.groups:
            raise AddressOutOfRange(command.address)
        return address, shape, heads, groups

    def _read(self, command: c.Read, submission: c.Submission) -> int:
        address, _, heads, groups = self._rectangle(command)
        data = self.ftl.read(
            address.task,
            address.batch,
            address.layer,
            address.view,
            np.arange(address.head, address.head + heads),
            np.arange(address.group, address.group + groups),
        )
        self._memory.scatter(submission.prp1, submission.prp2, data.reshape(-1))
        return heads * groups

    def _write(self, command: c.Write, submission: c.Submission) -> int:
        """Whole groups of a prefill: K pages wait in DRAM until V of the same rectangle arrives."""
        address, shape, heads, groups = self._rectangle(command)
        if address.view is PageKind.K_CHANNEL or address.head or heads != shape.kv_heads:
            raise InvalidField(10)
        key = (address.task, address.batch, address.layer)
        held = int(self.ftl.sequence(*key[:2]).tokens[address.layer])
        if address.group * shape.tokens_per_page != held:
            raise NotSequential(command.address)
        size = heads * groups * shape.page_bytes
        images = self._take(submission, size).reshape(heads, groups, shape.page_bytes)
        if address.view is PageKind.K_TOKEN:
            self._staged[key] = (groups, pages.k_from_token_pages(shape, images))
            return held
        waiting, k = self._staged.get(key, (0, images))
        if waiting != groups:
            raise NotSequential(command.address)
        kv = np.stack([k, pages.v_from_token_pages(shape, images)])
        held = self.ftl.append(*key, groups * shape.tokens_per_page, kv)
        del self._staged[key]
        return held

    def _append(self, command: c.Append, submission: c.Submission) -> int:
        """Tokens held afterwards; with no tokens it only asks (the host's question after a power loss)."""
        address, shape = self._address(command.address)
        if not command.tokens:
            known = (address.task, address.batch) in self.ftl.sequences
            sequence = self.ftl.sequence(address.task, address.batch) if known else None
            return int(sequence.tokens[address.layer]) if sequence else 0
        if command.tokens > shape.max_tokens:
            raise ContextFull(command.tokens)
        rows = (2, shape.kv_heads, command.tokens, shape.head_size)
        kv = self._take(submission, int(np.prod(rows)) * 2).view(np.uint16).reshape(rows)
        return self.ftl.append(address.task, address.batch, address.layer, command.tokens, kv)

    def _reclaim(self, command: c.Reclaim, _: c.Submission) -> int:
        a, _shape = self._address(command.address)
        span = Span(
            a.task,
            a.batch,
            command.batch,
            a.layer,
            command.layers,
            a.head,
            command.heads,
            a.group,
            command.groups,
        )
        return self.ftl.reclaim(span)

    def _attend(self, command: c.Attend, submission: c.Submission) -> int:
        """Records of all sequences; one that failed has only its header."""
        address, shape = self._address(command.address)
        batch = max(1, command.batch)
        record = record_bytes(shape, bool(command.partial))
        queries = self._take(submission, batch * shape.q_heads * shape.row_bytes)
        q = queries.view(np.float16).reshape(batch, shape.kv_heads, -1, shape.head_size)
        records = np.zeros((batch, record), np.uint8)
        failed = []
        for i in range(batch):
            status, detail = 0, 0
            try:
                records[i, ATTEND_HEADER_BYTES:] = self._attend_one(
                    command, address, shape, address.batch + i, q[i]
                )
            except DriveError as error:
                status, detail = error.status, error.detail & 0xFFFFFFFF
                failed.append(i)
            records[i, :ATTEND_HEADER_BYTES] = np.array([status, detail], "<u4").view(np.uint8)
        self._memory.scatter(submission.prp1, submission.prp2, records.reshape(-1))
        if failed:
            raise _Partial(batch - len(failed), failed[0])
        return batch

    def _attend_one(
        self, command: c.Attend, address: LogicalAddress, shape: TaskShape, batch: int, q: np.ndarray
    ) -> np.ndarray:
        """Record of one sequence behind its header, uint8."""
        held = int(self.ftl.existing(address.task, batch).tokens[address.layer])
        tokens = command.tokens or held
        if not 0 < tokens <= held:
            raise Unmapped(batch)
        sparse = bool(command.sparse)
        bad_selection = command.r > shape.head_size or command.k > tokens or command.window > command.k
        if sparse and (bad_selection or not command.r or not command.k):
            raise TopKRange(12)
        outcomes = []
        for head in range(shape.kv_heads):
            source = HeadPages(self.ftl, address.task, batch, address.layer, head)
            job = Job(q[head], tokens, sparse, command.r, command.k, command.window)
            outcomes.append(self.unit.attend(job, source))
            for view, count in source.pages_read.items():
                self.pages_read[view] += count
        parts = [np.concatenate([o.output.reshape(-1).view(np.uint8) for o in outcomes])]
        if command.partial:
            for name, kind in (("sum", "<u8"), ("maximum", "<i4")):
                values = np.concatenate([getattr(o, name) for o in outcomes]).astype(kind)
                parts.insert(0, values.view(np.uint8))
        return np.concatenate(parts)


class _Partial(Exception):
    """Some sequences of a batch failed: how many did not, and the first that did."""

    def __init__(self, good: int, first: int) -> None:
        self.good, self.first = good, first
