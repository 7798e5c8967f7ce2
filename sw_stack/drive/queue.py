"""Host memory with PRP lists, and NVMe submission and completion rings with doorbells.

The rings live in host memory as on a real system; both sides touch them only through `HostMemory`. Ownership:
the host moves submission tails and completion heads, the drive the other two; a phase tag marks what is new.
"""

from __future__ import annotations

import numpy as np

from golden.spec import KVStrataError
from golden.spec.nvme import CQE_BYTES, DOORBELL_BASE, DOORBELL_STRIDE, HOST_PAGE_BYTES, SQE_BYTES
from sw_stack.drive.commands import Completion, decode_completion, encode_completion
from sw_stack.drive.errors import TransferError

POINTER_BYTES = 8
POINTERS_PER_LIST = HOST_PAGE_BYTES // POINTER_BYTES


class HostMemory:
    """A flat, byte-addressed memory (host DRAM or mapped GPU memory) with a page allocator.

    Address 0 is never handed out, so that a zero pointer is a bug that shows. Raises TransferError for an
    access outside the memory, KVStrataError when an allocation does not fit.
    """

    def __init__(self, size_bytes: int) -> None:
        self._bytes = np.zeros(size_bytes, np.uint8)
        self._next = HOST_PAGE_BYTES
        self._free: dict[int, list[int]] = {}

    def allocate(self, size_bytes: int) -> int:
        """Page-aligned address of `size_bytes`; freed blocks of the same page count are used again."""
        pages = max(1, -(-size_bytes // HOST_PAGE_BYTES))
        if self._free.get(pages):
            return self._free[pages].pop()
        address, self._next = self._next, self._next + pages * HOST_PAGE_BYTES
        if self._next > len(self._bytes):
            raise KVStrataError(
                f"host memory holds {len(self._bytes)} bytes; got a request for {size_bytes} more"
            )
        return address

    def free(self, address: int, size_bytes: int) -> None:
        """Give back what `allocate(size_bytes)` returned."""
        self._free.setdefault(max(1, -(-size_bytes // HOST_PAGE_BYTES)), []).append(address)

    def view(self, address: int, size_bytes: int) -> np.ndarray:
        """uint8[size_bytes] at `address`, writable in place."""
        if not 0 < address <= len(self._bytes) - size_bytes:
            raise TransferError(address & 0xFFFFFFFF)
        return self._bytes[address : address + size_bytes]

    def prps(self, address: int, size_bytes: int) -> tuple[int, int, list[int]]:
        """(PRP1, PRP2, list pages) that describe a buffer; the caller frees the list pages afterwards."""
        first = HOST_PAGE_BYTES - address % HOST_PAGE_BYTES
        pages = list(range(address + first, address + size_bytes, HOST_PAGE_BYTES))
        if len(pages) <= 1:
            return address, pages[0] if pages else 0, []
        return address, *self._write_list(pages)

    def _write_list(self, pages: list[int]) -> tuple[int, list[int]]:
        """Chained PRP lists: the last pointer of a full list names the next list."""
        room = POINTERS_PER_LIST - 1
        chunks = [pages[i : i + room] for i in range(0, len(pages), room)]
        lists = [self.allocate(HOST_PAGE_BYTES) for _ in chunks]
        for i, chunk in enumerate(chunks):
            pointers = np.zeros(POINTERS_PER_LIST, "<u8")
            pointers[: len(chunk)] = chunk
            if i + 1 < len(lists):
                pointers[-1] = lists[i + 1]
            self.view(lists[i], HOST_PAGE_BYTES)[:] = pointers.view(np.uint8)
        return lists[0], lists

    def extents(self, prp1: int, prp2: int, size_bytes: int) -> list[tuple[int, int]]:
        """[(address, bytes)] of a transfer as the drive reads it from PRP1 and PRP2."""
        first = min(size_bytes, HOST_PAGE_BYTES - prp1 % HOST_PAGE_BYTES)
        extents, left = [(prp1, first)], size_bytes - first
        if 0 < left <= HOST_PAGE_BYTES:
            return [*extents, (prp2, left)]
        while left > 0:
            pointers = self.view(prp2, HOST_PAGE_BYTES).view("<u8")
            for pointer in pointers[:-1]:
                take = min(left, HOST_PAGE_BYTES)
                extents.append((int(pointer), take))
                left -= take
                if not left:
                    break
            prp2 = int(pointers[-1])
        return extents

    def gather(self, prp1: int, prp2: int, size_bytes: int) -> np.ndarray:
        """uint8[size_bytes] copied from the extents of a transfer."""
        if not size_bytes:
            return np.zeros(0, np.uint8)
        return np.concatenate([self.view(a, n) for a, n in self.extents(prp1, prp2, size_bytes)])

    def scatter(self, prp1: int, prp2: int, data: np.ndarray) -> None:
        """Copy uint8 `data` to the extents of a transfer."""
        at = 0
        for address, n in self.extents(prp1, prp2, len(data)) if len(data) else ():
            self.view(address, n)[:] = data[at : at + n]
            at += n


class Doorbells:
    """The doorbell registers of the drive's BAR; a write tells the drive that a ring index moved."""

    def __init__(self) -> None:
        self._registers: dict[int, int] = {}

    @staticmethod
    def offset(queue_id: int, completion: bool) -> int:
        """Register offset of a queue's submission tail or completion head doorbell."""
        return DOORBELL_BASE + (2 * queue_id + completion) * DOORBELL_STRIDE

    def write(self, offset: int, value: int) -> None:
        """Host side: set a doorbell."""
        self._registers[offset] = value

    def read(self, offset: int) -> int:
        """Drive side: the value last written; 0 after reset."""
        return self._registers.get(offset, 0)


class QueuePair:
    """One submission and one completion ring of `depth` entries in host memory, with both sides' indices.

    Holds at most depth - 1 commands, as NVMe demands; KVStrataError when the host submits to a full ring.
    """

    def __init__(self, memory: HostMemory, doorbells: Doorbells, queue_id: int, depth: int) -> None:
        if depth < 2:
            raise KVStrataError(f"an NVMe queue has at least 2 entries; got {depth}")
        self.queue_id, self.depth = queue_id, depth
        self._memory, self._doorbells = memory, doorbells
        self._sq = memory.allocate(depth * SQE_BYTES)
        self._cq = memory.allocate(depth * CQE_BYTES)
        memory.view(self._cq, depth * CQE_BYTES)[:] = 0
        self._sq_tail = self._sq_head_seen = self._cq_head = 0
        self._host_phase = 1
        self._sq_head = self._cq_tail = 0
        self._drive_phase = 1

    # --- host side
    @property
    def free_entries(self) -> int:
        """Submissions that fit before the drive reports progress."""
        return (self._sq_head_seen - self._sq_tail - 1) % self.depth

    def submit(self, entry: bytes) -> None:
        """Put 64 bytes into the submission ring and ring its doorbell."""
        if not self.free_entries:
            raise KVStrataError(
                f"submission queue {self.queue_id} is full; got one more than its {self.depth - 1}"
            )
        slot = self._memory.view(self._sq + self._sq_tail * SQE_BYTES, SQE_BYTES)
        slot[:] = np.frombuffer(entry, np.uint8)
        self._sq_tail = (self._sq_tail + 1) % self.depth
        self._doorbells.write(Doorbells.offset(self.queue_id, False), self._sq_tail)

    def poll(self) -> Completion | None:
        """The next new completion, or None; frees its slot and rings the completion doorbell."""
        entry = self._memory.view(self._cq + self._cq_head * CQE_BYTES, CQE_BYTES)
        completion = decode_completion(entry.tobytes())
        if completion.phase != self._host_phase:
            return None
        self._sq_head_seen = completion.sq_head
        self._cq_head = (self._cq_head + 1) % self.depth
        self._host_phase ^= self._cq_head == 0
        self._doorbells.write(Doorbells.offset(self.queue_id, True), self._cq_head)
        return completion

    # --- drive side
    def fetch(self) -> bytes | None:
        """The next submitted entry, or None when the ring is empty or its completion would not fit."""
        if self._sq_head == self._doorbells.read(Doorbells.offset(self.queue_id, False)):
            return None
        if (self._cq_tail + 1) % self.depth == self._doorbells.read(Doorbells.offset(self.queue_id, True)):
            return None
        entry = self._memory.view(self._sq + self._sq_head * SQE_BYTES, SQE_BYTES).tobytes()
        self._sq_head = (self._sq_head + 1) % self.depth
        return entry

    def post(self, cid: int, status: int, result: int, detail: int) -> None:
        """Write a completion entry with the current phase."""
        completion = Completion(cid, status, result, detail, self.queue_id, self._sq_head, self._drive_phase)
        slot = self._memory.view(self._cq + self._cq_tail * CQE_BYTES, CQE_BYTES)
        slot[:] = np.frombuffer(encode_completion(completion), np.uint8)
        self._cq_tail = (self._cq_tail + 1) % self.depth
        self._drive_phase ^= self._cq_tail == 0
