"""The host's typed face of a drive: one method per command, exceptions for statuses.

Buffers are copied into host memory, described by PRPs, submitted and waited for. A completion with an error raises
its class of `errors`; a drive that posts nothing within the polling limit raises DeviceTimeout, and its queue goes on
working once the drive does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from golden.spec import KVStrataError
from golden.spec.nvme import ATTEND_HEADER_BYTES, AddressMap, LogicalAddress, Status
from golden.spec.storage import PageKind
from sw_stack.device.protocol import DeviceTimeout
from sw_stack.drive import commands as c
from sw_stack.drive.attention import AttentionUnit
from sw_stack.drive.controller import Controller, record_bytes
from sw_stack.drive.errors import DriveError, from_status
from sw_stack.drive.flash import FlashArray, Geometry
from sw_stack.drive.ftl import Ftl, FtlOptions
from sw_stack.drive.queue import Doorbells, HostMemory, QueuePair
from sw_stack.drive.shape import TaskShape

POLLS = 1000


@dataclass(frozen=True)
class Selection:
    """SparF parameters of an attend: r channels, k tokens of which `window` are the most recent."""

    r: int
    k: int
    window: int


@dataclass(frozen=True)
class Attended:
    """Outputs float16 [batch, q_heads, dh], softmax maxima and sums int64 [batch, q_heads] if asked for.

    `errors` holds what failed by batch index; those rows are zero.
    """

    outputs: np.ndarray
    maximum: np.ndarray
    sum: np.ndarray
    errors: dict[int, DriveError]


class Driver:
    """One queue pair towards one drive. `advance` lets the drive work (a call into its model, or nothing)."""

    def __init__(self, memory: HostMemory, queue: QueuePair, advance: Callable[[], object]) -> None:
        self._memory, self._queue, self._advance = memory, queue, advance
        self._next_cid = 0
        self._shapes: dict[int, TaskShape] = {}
        self._map: AddressMap | None = None
        self._late: set[int] = set()

    # --- transport
    def _execute(
        self, command: c.Command, data: np.ndarray | None = None, size: int = 0
    ) -> tuple[int, np.ndarray]:
        """(result, bytes read back) of a command with a buffer of max(len(data), size) bytes."""
        data = (
            np.zeros(0, np.uint8) if data is None else np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        )
        length = max(len(data), size)
        buffer = self._memory.allocate(length)
        lists: list[int] = []
        try:
            self._memory.view(buffer, len(data))[:] = data
            prp1, prp2, lists = self._memory.prps(buffer, length)
            completion = self._submit(c.Submission(command, self._cid(), prp1, prp2))
            back = self._memory.view(buffer, size).copy()
        finally:
            self._memory.free(buffer, length)
            for page in lists:
                self._memory.free(page, 4096)
        if completion.status == Status.PARTIAL_BATCH:
            return completion.result, back
        if completion.status:
            raise from_status(completion.status, completion.detail)
        return completion.result, back

    def _cid(self) -> int:
        self._next_cid = (self._next_cid + 1) & 0xFFFF
        return self._next_cid

    def _submit(self, submission: c.Submission) -> c.Completion:
        self._queue.submit(c.encode(submission))
        for _ in range(POLLS):
            self._advance()
            completion = self._queue.poll()
            if completion is None:
                continue
            if completion.cid == submission.cid:
                return completion
            if completion.cid not in self._late:
                raise KVStrataError(f"a completion names a command in flight; got id {completion.cid}")
            self._late.discard(completion.cid)
        self._late.add(submission.cid)
        raise DeviceTimeout(
            f"the drive must complete a command within {POLLS} polls; command {submission.cid} is open"
        )

    def _word(self, task: int, batch: int, layer: int, view: PageKind, head: int = 0, group: int = 0) -> int:
        if self._map is None:
            raise KVStrataError(f"configure a task before using it; got task {task}")
        return self._map.pack(LogicalAddress(view, task, batch, layer, head, group))

    def _shape(self, task: int) -> TaskShape:
        if task not in self._shapes:
            raise KVStrataError(f"configure a task before using it; got task {task}")
        return self._shapes[task]

    # --- commands
    def config(self, task: int, shape: TaskShape, batch: int) -> None:
        """Open a task for up to `batch` sequences of `shape`."""
        widths = self._map if self._shapes and self._map else shape.address_map(batch)
        self._execute(
            c.Config(
                task,
                shape.layers,
                shape.q_heads,
                shape.kv_heads,
                shape.head_size,
                shape.channels_per_page,
                shape.max_tokens,
                widths.batch_bits,
                widths.layer_bits,
                widths.head_bits,
                widths.group_bits,
            )  # fmt: skip
        )
        self._map, self._shapes[task] = widths, shape

    def append(self, task: int, batch: int, layer: int, k: np.ndarray, v: np.ndarray) -> int:
        """Append k and v float16 [kv_heads, tokens, dh]; tokens held afterwards."""
        command = c.Append(self._word(task, batch, layer, PageKind.K_TOKEN), k.shape[1])
        return self._execute(command, np.stack([k, v]))[0]

    def held(self, task: int, batch: int, layer: int) -> int:
        """Tokens that the drive holds of a layer of a sequence (after a power loss: what to append from)."""
        return self._execute(c.Append(self._word(task, batch, layer, PageKind.K_TOKEN), 0))[0]

    def write_groups(
        self, task: int, batch: int, layer: int, view: PageKind, group: int, images: np.ndarray
    ) -> int:
        """Write page images uint8 [kv_heads, groups, page_bytes]: K first, then V."""
        command = c.Write(self._word(task, batch, layer, view, 0, group), images.shape[0], images.shape[1])
        return self._execute(command, images)[0]

    def read_groups(
        self,
        task: int,
        batch: int,
        layer: int,
        view: PageKind,
        head: int,
        heads: int,
        group: int,
        groups: int,
    ) -> np.ndarray:
        """Page images uint8 [heads, groups, page_bytes]."""
        page = self._shape(task).page_bytes
        command = c.Read(self._word(task, batch, layer, view, head, group), heads, groups)
        return self._execute(command, size=heads * groups * page)[1].reshape(heads, groups, page)

    def attend(
        self,
        task: int,
        batch: int,
        layer: int,
        q: np.ndarray,
        selection: Selection | None = None,
        tokens: int = 0,
        partial: bool = False,
    ) -> Attended:
        """Attention of q float16 [sequences, q_heads, dh] for sequences batch, batch + 1, ... over their first
        `tokens` tokens (0: all they hold). Sequences fail one by one: see `Attended.errors`."""
        shape = self._shape(task)
        s = selection or Selection(0, 0, 0)
        command = c.Attend(
            self._word(task, batch, layer, PageKind.K_TOKEN), len(q), int(selection is not None), int(partial),
            s.r, s.window, s.k, tokens,
        )  # fmt: skip
        record = record_bytes(shape, partial)
        _, raw = self._execute(command, q, size=len(q) * record)
        return _attended(raw.reshape(len(q), record), shape, partial)

    def reclaim(self, task: int, batch: int = 0, batches: int = 0, group: int = 0, groups: int = 0) -> int:
        """Invalidate groups of all layers and heads; pages released. Counts of 0 reach to the end."""
        word = self._word(task, batch, 0, PageKind.K_TOKEN, 0, group)
        released = self._execute(c.Reclaim(word, batches, 0, 0, groups))[0]
        if not (batch or batches or group or groups):
            self._shapes.pop(task, None)
        return released


def _attended(records: np.ndarray, shape: TaskShape, partial: bool) -> Attended:
    """Records uint8 [batch, bytes] taken apart: header, maxima, sums, outputs."""
    sizes = [ATTEND_HEADER_BYTES, *((4 * shape.q_heads, 8 * shape.q_heads) if partial else (0, 0))]
    ends = np.cumsum(sizes)
    header, maximum, total, output = (np.ascontiguousarray(p) for p in np.split(records, ends, axis=1))
    errors = {i: from_status(int(s), int(d)) for i, (s, d) in enumerate(header.view("<u4")) if s}
    outputs = output.view(np.float16).reshape(len(records), shape.q_heads, shape.head_size)
    return Attended(outputs, maximum.view("<i4").astype(np.int64), total.view("<u8").astype(np.int64), errors)


def open_drive(
    geometry: Geometry | None = None,
    options: FtlOptions | None = None,
    unit: AttentionUnit | None = None,
    host_bytes: int = 64 << 20,
    depth: int = 64,
    flash: FlashArray | None = None,
) -> tuple[Driver, Controller]:
    """A driver connected to a drive model over one queue pair in its own host memory."""
    memory, doorbells = HostMemory(host_bytes), Doorbells()
    queue = QueuePair(memory, doorbells, 1, depth)
    flash = flash or FlashArray(geometry or Geometry(blocks_per_die=16, pages_per_block=64))
    controller = Controller(memory, [queue], Ftl(flash, options or FtlOptions()), unit)
    return Driver(memory, queue, controller.process), controller
