"""Where pages go: open blocks per task, striping slots, wear, dead blocks and erasing.

A task has one open block per *stripe slot* (one slot per die), so that groups of all its heads and sequences
share blocks and die together when the task is reclaimed: no valid page is ever copied. A slot normally writes to
its own die; when that die has nothing erased left it borrows a block from another, and the last resort is the
open block of another slot of the same task. So an allocation fails only when nothing erasable is left at all.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

from sw_stack.drive.errors import DriveFull, WriteFault
from sw_stack.drive.flash import FlashArray

PROGRAM_ATTEMPTS = 4
"""A page that fails in this many blocks makes the command fail: the die is broken, not a block."""


@dataclass
class OpenBlocks:
    """Per stripe slot: next page number to program and pages left in the open block."""

    next_page: np.ndarray
    left: np.ndarray


@dataclass
class Counters:
    """What the allocator did beyond writing."""

    foreground_erases: int = 0
    idle_erases: int = 0
    borrowed_blocks: int = 0
    retired_blocks: int = 0
    discarded_pages: int = 0


@dataclass
class Allocator:
    """Block states of one flash array. `valid` counts mapped pages per block."""

    flash: FlashArray
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        g = self.flash.geometry
        self.valid = np.zeros(g.blocks, np.int64)
        self._open: dict[int, OpenBlocks] = {}
        self._is_open = np.zeros(g.blocks, bool)
        self._retiring = np.zeros(g.blocks, bool)
        self._dead: list[tuple[int, int, int]] = []
        self._free: list[list[tuple[int, int]]] = [[] for _ in range(g.dies)]
        for block in np.flatnonzero(~self.flash.bad & (self.flash.write_pointer == 0)):
            self._add_free(int(block))

    # --- capacity
    @property
    def free_blocks(self) -> int:
        """Erased blocks."""
        return sum(map(len, self._free))

    @property
    def dead_blocks(self) -> int:
        """Blocks that hold nothing valid and wait for an erase."""
        return len(self._dead)

    def capacity_pages(self, task: int) -> int:
        """Pages that `task` can still program without anybody reclaiming anything."""
        opened = int(self._open[task].left.sum()) if task in self._open else 0
        return opened + (self.free_blocks + self.dead_blocks) * self.flash.geometry.pages_per_block

    # --- writing
    def write(
        self, task: int, slots: np.ndarray, address: np.ndarray, tokens: np.ndarray, data: np.ndarray | None
    ) -> np.ndarray:
        """Program n pages, each near its stripe slot; int64[n] page numbers, all counted valid.

        Pages that fail are programmed again elsewhere and their blocks retired. DriveFull or WriteFault leave
        every page of the call discarded.
        """
        if len(slots) > self.capacity_pages(task):
            raise DriveFull(int(address[0]))
        ppns = np.full(len(slots), -1, np.int64)
        todo = np.arange(len(slots))
        try:
            for _ in range(PROGRAM_ATTEMPTS):
                got = self._allocate(task, slots[todo])
                ppns[todo] = got
                failed = self.flash.program(
                    got, address[todo], tokens[todo], None if data is None else data[todo]
                )
                if not failed.any():
                    return ppns
                self._retire(task, got[failed])
                self.discard(got[failed])
                ppns[todo[failed]] = -1
                todo = todo[failed]
        except DriveFull:
            self.discard(ppns[ppns >= 0])
            raise
        self.discard(ppns[ppns >= 0])
        raise WriteFault(int(address[todo[0]]))

    def _allocate(self, task: int, slots: np.ndarray) -> np.ndarray:
        opened = self._opened(task)
        counts = np.bincount(slots, minlength=len(opened.left))
        order = np.argsort(slots, kind="stable")
        ppns = np.empty(len(slots), np.int64)
        if (counts <= opened.left).all():
            start = np.cumsum(counts) - counts
            sorted_slots = slots[order]
            ppns[order] = opened.next_page[sorted_slots] + np.arange(len(slots)) - start[sorted_slots]
            opened.next_page += counts
            opened.left -= counts
        else:
            ppns[order] = self._allocate_with_rollover(task, opened, counts)
        blocks = ppns // self.flash.geometry.pages_per_block
        np.add.at(self.valid, blocks, 1)
        return ppns

    def _allocate_with_rollover(self, task: int, opened: OpenBlocks, counts: np.ndarray) -> np.ndarray:
        runs: list[np.ndarray] = []
        try:
            for slot in np.flatnonzero(counts):
                need = int(counts[slot])
                while need:
                    if not opened.left[slot]:
                        self._refill(opened, int(slot))
                    take = min(need, int(opened.left[slot]))
                    runs.append(opened.next_page[slot] + np.arange(take))
                    opened.next_page[slot] += take
                    opened.left[slot] -= take
                    need -= take
        except DriveFull:
            self._skip(np.concatenate(runs) if runs else np.zeros(0, np.int64))
            raise
        return np.concatenate(runs)

    def _skip(self, ppns: np.ndarray) -> None:
        """Pages handed out but never to be programmed: fill them, because a block is programmed in order."""
        blocks = ppns // self.flash.geometry.pages_per_block
        np.add.at(self.valid, blocks, 1)
        zeros = np.zeros(len(ppns), np.uint32)
        self.flash.program(ppns, zeros, zeros.astype(np.uint16), None)
        self.flash.unreadable[ppns] = True
        self.discard(ppns)

    def _opened(self, task: int) -> OpenBlocks:
        if task not in self._open:
            dies = self.flash.geometry.dies
            self._open[task] = OpenBlocks(np.zeros(dies, np.int64), np.zeros(dies, np.int64))
        return self._open[task]

    def _refill(self, opened: OpenBlocks, slot: int) -> None:
        """Give a slot a new open block: own die, other dies, a dead block, another slot's block."""
        pages = self.flash.geometry.pages_per_block
        block = self._take_free(slot)
        if block is None:
            donor = int(np.argmax(opened.left))
            if not opened.left[donor]:
                raise DriveFull()
            opened.next_page[slot], opened.left[slot] = opened.next_page[donor], opened.left[donor]
            opened.left[donor] = 0
            return
        full = (opened.next_page[slot] - 1) // pages
        if opened.next_page[slot]:
            self._is_open[full] = False
        self._is_open[block] = True
        opened.next_page[slot], opened.left[slot] = block * pages, pages

    def _take_free(self, slot: int) -> int | None:
        g = self.flash.geometry
        while True:
            same_channel = [(slot + k * g.channels) % g.dies for k in range(g.dies_per_channel)]
            for die in [*same_channel, *range(g.dies)]:
                if self._free[die]:
                    self.counters.borrowed_blocks += die != slot
                    return heapq.heappop(self._free[die])[1]
            if not self._dead:
                return None
            self.counters.foreground_erases += 1
            self._erase_oldest()

    def _retire(self, task: int, failed: np.ndarray) -> None:
        """Close blocks in which a program failed; they become bad once nothing in them is valid."""
        pages = self.flash.geometry.pages_per_block
        opened = self._opened(task)
        for block in np.unique(failed // pages):
            slots = np.flatnonzero((opened.left > 0) & (opened.next_page // pages == block))
            opened.left[slots] = 0
            self._is_open[block] = False
            self._retiring[block] = True

    # --- releasing
    def discard(self, ppns: np.ndarray) -> None:
        """Invalidate pages of a command that did not complete."""
        self.counters.discarded_pages += len(ppns)
        self.release(ppns, stamp=0)

    def release(self, ppns: np.ndarray, stamp: int) -> None:
        """Invalidate pages; blocks that hold nothing else become erasable, least recently used (stamp) first."""
        if not len(ppns):
            return
        blocks, counts = np.unique(ppns // self.flash.geometry.pages_per_block, return_counts=True)
        self.valid[blocks] -= counts
        self._bury(blocks[self.valid[blocks] == 0], stamp)

    def close_task(self, task: int, stamp: int) -> None:
        """Close the open blocks of a task that has nothing mapped any more."""
        opened = self._open.pop(task, None)
        if opened is None:
            return
        pages = self.flash.geometry.pages_per_block
        blocks = np.unique(np.maximum(opened.next_page - 1, 0) // pages)
        blocks = blocks[self._is_open[blocks]]
        self._is_open[blocks] = False
        self._bury(blocks[self.valid[blocks] == 0], stamp)

    def _bury(self, blocks: np.ndarray, stamp: int) -> None:
        for block in blocks[~self._is_open[blocks]]:
            if self._retiring[block]:
                self._retiring[block] = False
                self.flash.bad[block] = True
                self.counters.retired_blocks += 1
            else:
                heapq.heappush(self._dead, (stamp, int(self.flash.erase_count[block]), int(block)))

    def _erase_oldest(self) -> None:
        _, _, block = heapq.heappop(self._dead)
        if self.flash.erase(block):
            self._add_free(block)
        else:
            self.counters.retired_blocks += 1

    def _add_free(self, block: int) -> None:
        die = block // self.flash.geometry.blocks_per_die
        heapq.heappush(self._free[die], (int(self.flash.erase_count[block]), block))

    def idle(self, threshold_blocks: int, max_erases: int) -> int:
        """Erase dead blocks while fewer than `threshold_blocks` are free; number of erases."""
        done = 0
        while done < max_erases and self._dead and self.free_blocks < threshold_blocks:
            self._erase_oldest()
            done += 1
        self.counters.idle_erases += done
        return done

    # --- mounting
    def adopt(self, ppns: np.ndarray) -> None:
        """After a power loss: count mapped pages valid, close every programmed block, queue the dead ones."""
        pages = self.flash.geometry.pages_per_block
        np.add.at(self.valid, ppns // pages, 1)
        programmed = np.flatnonzero((self.flash.write_pointer > 0) & ~self.flash.bad)
        self._bury(programmed[self.valid[programmed] == 0], stamp=0)
