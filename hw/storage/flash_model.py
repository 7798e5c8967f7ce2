"""Flash behind the unit, for simulation: one channel at the interface of its filter, cycle by cycle.

`flash_model.h` is the same model in C++; both take the same parameters and give the same beats in the same cycles.
Each array (a die, or a plane of it) senses one page at a time, in the order of its reads; pages move whole over the
channel's data bus at its rate. The unit grants a kernel's pages in order; of the granted pages that are ready the
channel sends the oldest. Commands and grants travel on wires of their own, as in separate command-address interfaces,
so they delay a page but take no data time. Assumptions FLS-01 to FLS-09.
"""

import struct
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from golden.spec import SPEC_VERSION, KVStrataError
from golden.spec.storage import CHANNEL_BEAT_BYTES, PAGE_BYTES, PAGE_CHANNEL_BEATS, PPN

IMAGE_MAGIC = b"KVFLASH"
ERASED = b"\xff" * PAGE_BYTES
"""What a page reads as that nobody wrote."""
MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class FlashParams:
    """One channel's timing and faults; integers, so that both models agree. Times in cycles are of the unit's clock."""

    clock_mhz: int = 285
    channel_mb_per_s: int = 1400
    """Payload of the data bus, 10^6 byte/s."""
    dies: int = 16
    planes: int = 4
    independent_planes: int = 1
    """1: each plane senses on its own; 0: one page per die at a time."""
    cache_read: int = 1
    """1: an array senses its next page while the last one waits in the cache register."""
    read_ns: int = 50_000
    """tR, array to page register."""
    command_ns: int = 300
    """Command and address before an array starts."""
    ecc_ns: int = 1_000
    """Decoder latency of a page; pages overlap in it."""
    queue: int = 64
    """Reads that a channel accepts before the first has left."""
    retry_per_million: int = 0
    """Pages that need read retries."""
    retry_max: int = 5
    """Most retries of one page, each another tR; a page that fails takes all of them."""
    fail_per_million: int = 0
    """Pages that stay uncorrectable."""
    seed: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name.endswith(("_ns", "_million", "seed", "_planes", "_read", "_max")) else 1
            if not isinstance(value, int) or value < least:
                raise KVStrataError(
                    f"flash parameter {name} must be an integer of at least {least}, not {value!r}"
                )
        if self.channel_mb_per_s > self.clock_mhz * CHANNEL_BEAT_BYTES:
            raise KVStrataError(
                f"a channel interface moves {CHANNEL_BEAT_BYTES} byte per cycle, {self.clock_mhz * CHANNEL_BEAT_BYTES} "
                f"MB/s at {self.clock_mhz} MHz, not {self.channel_mb_per_s}"
            )

    def cycles(self, nanoseconds: int) -> int:
        """A time in whole cycles, rounded up."""
        return -(-nanoseconds * self.clock_mhz // 1000)

    @property
    def arrays(self) -> int:
        """Pages of a channel that may be sensed at once."""
        return self.dies * (self.planes if self.independent_planes else 1)

    def array(self, ppn: int) -> int:
        """The array of its channel that senses a physical page."""
        place = PPN.unpack(ppn)
        die, plane = place["die"] % self.dies, place["plane"] % self.planes
        return die * self.planes + plane if self.independent_planes else die

    @property
    def sustained_mb_per_s(self) -> float:
        """Upper bound of a channel's rate for pages spread evenly: its bus, or its arrays."""
        transfer_ns = 1000 * PAGE_BYTES / self.channel_mb_per_s
        waits_ns = self.command_ns + self.read_ns + self.ecc_ns + transfer_ns
        period_ns = max(self.read_ns, transfer_ns) if self.cache_read else waits_ns
        return min(self.channel_mb_per_s, 1000 * PAGE_BYTES * self.arrays / period_ns)

    def arguments(self) -> list[str]:
        """`name=value` words for a program built on `flash_model.h`."""
        return [f"{name}={value}" for name, value in asdict(self).items()]


def page_hash(seed: int, ppn: int, salt: int) -> int:
    """64 random bits of a page (splitmix64): faults belong to pages, not to the order in which they are read."""
    z = (seed * 0x9E3779B97F4A7C15 + ppn * 0xD1B54A32D192ED03 + salt * 0x8CB92BA72F3D8DD7) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def page_fault(params: FlashParams, ppn: int) -> tuple[int, bool]:
    """(read retries, whether the page fails after them) of a physical page."""
    if page_hash(params.seed, ppn, 1) % 1_000_000 < params.fail_per_million:
        return params.retry_max, True
    if params.retry_max and page_hash(params.seed, ppn, 2) % 1_000_000 < params.retry_per_million:
        return 1 + page_hash(params.seed, ppn, 3) % params.retry_max, False
    return 0, False


class Beat(NamedTuple):
    """One `CHANNEL_BEAT`."""

    data: int
    first: int
    last: int
    fail: int
    slot: int
    kernel: int


class Command(NamedTuple):
    """One `FLASH_READ`."""

    ppn: int
    kernel: int = 0


class Grant(NamedTuple):
    """The name under which a kernel's oldest page without one may be sent."""

    slot: int
    kernel: int = 0


@dataclass(eq=False)
class _Read:
    ppn: int
    kernel: int
    array: int
    retries: int
    fail: bool
    slot: int | None = None
    ready_at: int | None = None


class FlashChannel:
    """One channel: `offer` what it drives in this cycle, then `tick` with what the unit did.

    `pages` maps a packed `PPN` to 4096 bytes. `failing` adds physical pages that are uncorrectable.
    """

    def __init__(
        self, params: FlashParams, pages: Mapping[int, bytes], failing: frozenset[int] = frozenset()
    ):
        self.params, self._pages, self._failing = params, pages, failing
        self._cost = CHANNEL_BEAT_BYTES * params.clock_mhz
        self.now = 0
        self._reads: list[_Read] = []  # in order of their commands, until they have been sent
        self._nameless: dict[int, deque[_Read]] = defaultdict(deque)  # per kernel, without a grant
        self._grants: dict[int, deque[int]] = defaultdict(deque)  # per kernel, without a read
        self._waiting: list[deque[_Read]] = [deque() for _ in range(params.arrays)]
        self._sensed_at = [0] * params.arrays
        self._holding = [0] * params.arrays
        self._sending: _Read | None = None
        self._credit = 0
        self._sent = 0
        self.delivered = 0

    @property
    def command_ready(self) -> bool:
        """Whether a command is taken in this cycle."""
        return len(self._reads) < self.params.queue

    def offer(self) -> Beat | None:
        """The beat on the channel in this cycle, or None; the unit takes every one."""
        read = self._sending
        if read is None or self._credit < self._cost:
            return None
        at = self._sent * CHANNEL_BEAT_BYTES
        word = int.from_bytes(self._pages.get(read.ppn, ERASED)[at : at + CHANNEL_BEAT_BYTES], "little")
        if read.fail:
            word ^= page_hash(self.params.seed, read.ppn, 4 + self._sent)
        last = self._sent == PAGE_CHANNEL_BEATS - 1
        assert read.slot is not None
        return Beat(word, int(self._sent == 0), int(last), int(read.fail and last), read.slot, read.kernel)

    def tick(self, command: Command | None, grants: Iterable[Grant] = ()) -> None:
        """One clock edge: the command that is transferred, if any, and the grants given."""
        taken = self.offer() is not None
        if self._sending:
            self._credit -= self._cost * taken
            self._credit = min(self._credit + self.params.channel_mb_per_s, 2 * self._cost - 1)
        if taken:
            self._sent += 1
            if self._sent == PAGE_CHANNEL_BEATS:
                self._finish()
        if command is not None:
            self._accept(command)
        for grant in grants:
            self._grants[grant.kernel].append(grant.slot)
            self._name(grant.kernel)
        self.now += 1
        if self._sending is None:
            self._choose()

    def _accept(self, command: Command) -> None:
        array = self.params.array(command.ppn)
        retries, fail = page_fault(self.params, command.ppn)
        if command.ppn in self._failing:
            retries, fail = self.params.retry_max, True
        read = _Read(command.ppn, command.kernel, array, retries, fail)
        self._reads.append(read)
        self._waiting[array].append(read)
        self._nameless[command.kernel].append(read)
        self._name(command.kernel)
        self._start(array)

    def _name(self, kernel: int) -> None:
        """Give the kernel's oldest page without a name the oldest grant, if there are both."""
        if self._nameless[kernel] and self._grants[kernel]:
            self._nameless[kernel].popleft().slot = self._grants[kernel].popleft()

    def _choose(self) -> None:
        """The oldest of the granted pages that are ready."""
        ready = (
            r for r in self._reads if r.slot is not None and r.ready_at is not None and r.ready_at <= self.now
        )
        self._sending = next(ready, None)

    def _start(self, array: int) -> None:
        """Start the array's next page if a register is free for it."""
        while self._waiting[array] and self._holding[array] <= self.params.cache_read:
            read = self._waiting[array].popleft()
            p = self.params
            begin = max(self.now + p.cycles(p.command_ns), self._sensed_at[array])
            self._sensed_at[array] = begin + p.cycles(p.read_ns) * (1 + read.retries)
            read.ready_at = self._sensed_at[array] + p.cycles(p.ecc_ns)
            self._holding[array] += 1

    def _finish(self) -> None:
        read = self._sending
        assert read is not None
        self._reads.remove(read)
        self._sending = None
        self._holding[read.array] -= 1
        self._sent = 0
        self.delivered += 1
        self._start(read.array)


def write_image(path: Path, pages: Mapping[int, bytes], failing: frozenset[int] = frozenset()) -> None:
    """Write pages (packed PPN -> 4096 bytes) as the file that `flash_model.h` reads.

    Raises KVStrataError for a page of another size.
    """
    parts = [struct.pack("<7sBII", IMAGE_MAGIC, int(SPEC_VERSION), len(pages), len(failing))]
    for ppn, content in pages.items():
        if len(content) != PAGE_BYTES:
            raise KVStrataError(f"a flash page has {PAGE_BYTES} bytes; page {ppn:#x} has {len(content)}")
        parts += [struct.pack("<I", ppn), content]
    parts += [struct.pack("<I", ppn) for ppn in sorted(failing)]
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(b"".join(parts))
    part.replace(path)
