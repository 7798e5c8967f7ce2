"""The NAND array as firmware sees it: program in order, erase whole blocks, spare area, bad blocks, power loss.

Everything is arrays over pages or blocks, so that a batch of operations costs a few numpy calls. Numbering: a
*die index* is `channel + channels * die`; a block number is `die index * blocks_per_die + block`; a page number
(PPN) is `block number * pages_per_block + page`. Data are kept only on request: a drive of terabytes is
simulated by its spare areas alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from golden.spec import KVStrataError
from sw_stack.drive.journal import Record


@dataclass(frozen=True)
class Geometry:
    """Shape of the array; `page_bytes` is user data, the spare area comes on top."""

    channels: int = 8
    dies_per_channel: int = 8
    blocks_per_die: int = 256
    pages_per_block: int = 256
    page_bytes: int = 4096

    def __post_init__(self) -> None:
        for name in ("channels", "dies_per_channel", "blocks_per_die", "pages_per_block", "page_bytes"):
            if getattr(self, name) < 1:
                raise KVStrataError(f"flash geometry needs {name} >= 1; got {getattr(self, name)}")
        if self.pages >= 1 << 31:
            raise KVStrataError(f"page numbers have 31 bits; got a geometry of {self.pages} pages")

    @property
    def dies(self) -> int:
        """Dies of the whole drive."""
        return self.channels * self.dies_per_channel

    @property
    def blocks(self) -> int:
        """Blocks of the whole drive."""
        return self.dies * self.blocks_per_die

    @property
    def pages(self) -> int:
        """Pages of the whole drive."""
        return self.blocks * self.pages_per_block

    def channel_of(self, ppn: np.ndarray) -> np.ndarray:
        """Channel of each page number."""
        return ppn // (self.pages_per_block * self.blocks_per_die) % self.channels


class PowerLost(KVStrataError):
    """The power failed inside a program operation; the flash keeps what was programmed before."""


class FlashArray:
    """NAND state. Spare area per page: logical address, program number, valid tokens.

    Rules enforced (KVStrataError, a firmware bug): pages of a block are programmed in order and once between
    erases; a bad block is never touched. Faults are injected through `fail_program`, `fail_erase` (sets of page
    and block numbers), `unreadable` (bool per page) and `power_budget` (pages until the power fails).
    """

    def __init__(self, geometry: Geometry, store_data: bool = True, bad_blocks: tuple[int, ...] = ()) -> None:
        self.geometry = geometry
        n = geometry.pages
        self.data = np.zeros((n, geometry.page_bytes), np.uint8) if store_data else None
        self.address = np.zeros(n, np.uint32)
        self.program_number = np.zeros(n, np.int64)
        self.tokens = np.zeros(n, np.uint16)
        self.unreadable = np.zeros(n, bool)
        self.write_pointer = np.zeros(geometry.blocks, np.int32)
        self.erase_count = np.zeros(geometry.blocks, np.int32)
        self.bad = np.zeros(geometry.blocks, bool)
        self.bad[list(bad_blocks)] = True
        self.fail_program: set[int] = set()
        self.fail_erase: set[int] = set()
        self.power_budget: int | None = None
        self.journal: list[Record] = []
        self.reads = self.programs = self.erases = 0
        self._clock = 0

    def program(
        self, ppns: np.ndarray, address: np.ndarray, tokens: np.ndarray, data: np.ndarray | None
    ) -> np.ndarray:
        """Program pages; bool per page, True where it failed (its content is then unreadable).

        ppns int64[n], address uint32[n], tokens uint16[n], data uint8[n, page_bytes] or None. Raises PowerLost
        when the power budget runs out: earlier pages of the call are kept, one page is torn.
        """
        self._check_order(ppns)
        survives = len(ppns) if self.power_budget is None else min(len(ppns), self.power_budget)
        self._store(ppns[:survives], address[:survives], tokens[:survives], data)
        if survives < len(ppns):
            torn = ppns[survives : survives + 1]
            self._store(torn, address[survives : survives + 1], tokens[survives : survives + 1], None)
            self.unreadable[torn] = True
            raise PowerLost(f"the power failed while page {int(torn[0])} was programmed; it is torn")
        if self.power_budget is not None:
            self.power_budget -= len(ppns)
        return self._failures(ppns)

    def _check_order(self, ppns: np.ndarray) -> None:
        block, page = np.divmod(ppns, self.geometry.pages_per_block)
        order = np.argsort(ppns, kind="stable")
        b, p = block[order], page[order]
        first = np.ones(len(ppns), bool)
        first[1:] = b[1:] != b[:-1]
        expected = np.where(first, self.write_pointer[b], np.roll(p, 1) + 1)
        wrong = (p != expected) | self.bad[b]
        if wrong.any():
            i = int(np.argmax(wrong))
            raise KVStrataError(
                f"flash pages are programmed in order in good blocks; got page {int(p[i])} of block {int(b[i])} "
                f"where {int(expected[i])} is next"
            )

    def _store(
        self, ppns: np.ndarray, address: np.ndarray, tokens: np.ndarray, data: np.ndarray | None
    ) -> None:
        n = len(ppns)
        self.address[ppns], self.tokens[ppns] = address, tokens
        self.program_number[ppns] = np.arange(self._clock, self._clock + n) + 1
        self._clock += n
        if self.data is not None and data is not None:
            self.data[ppns] = data[:n]
        np.add.at(self.write_pointer, ppns // self.geometry.pages_per_block, 1)
        self.programs += n

    def _failures(self, ppns: np.ndarray) -> np.ndarray:
        failed = np.zeros(len(ppns), bool)
        if self.fail_program:
            failed = np.isin(ppns, list(self.fail_program))
            self.unreadable[ppns[failed]] = True
        return failed

    def read(self, ppns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(uint8[n, page_bytes], bool[n] True where ECC failed after retries); no data kept reads as zeros."""
        self.reads += len(ppns)
        if self.data is None:
            return np.zeros((len(ppns), 0), np.uint8), self.unreadable[ppns]
        return self.data[ppns], self.unreadable[ppns]

    def erase(self, block: int) -> bool:
        """Erase one block; False when it failed and is now bad."""
        if self.bad[block]:
            raise KVStrataError(f"a bad block is never erased; got block {block}")
        self.erases += 1
        if block in self.fail_erase:
            self.bad[block] = True
            return False
        pages = slice(block * self.geometry.pages_per_block, (block + 1) * self.geometry.pages_per_block)
        self.program_number[pages] = 0
        self.unreadable[pages] = False
        self.write_pointer[block] = 0
        self.erase_count[block] += 1
        return True

    def programmed(self) -> np.ndarray:
        """Page numbers that hold readable data, in order of programming (what a mount scan finds)."""
        live = np.flatnonzero((self.program_number > 0) & ~self.unreadable)
        return live[np.argsort(self.program_number[live], kind="stable")]

    def now(self) -> int:
        """Program number of the last programmed page; orders journal records against pages."""
        return self._clock
