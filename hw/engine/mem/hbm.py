"""The HBM model for Python test benches: the C++ model of `hbm_model.h` itself, through its C interface.

One source of timing and of statistics serves the C++ harness, cocotb and plain experiments, so they cannot disagree.
"""

import ctypes
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from golden.spec import KVStrataError
from golden.spec.memory import CHANNEL_BYTES, MemoryModel
from hw.flow.cxx import shared_library

SOURCES = Path(__file__).parent


class Stats(ctypes.Structure):
    """Counts of one pseudo-channel. `latency_cycles` sums, over read bursts, address transfer to first beat."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "accesses", "hits", "closed", "misses", "refreshes", "turnarounds", "read_bursts", "write_bursts",
            "bytes_read", "bytes_written", "latency_cycles", "latency_max",
        )
    ]  # fmt: skip


class ReadPins(ctypes.Structure):
    """What the memory drives on a read port in the next cycle."""

    _fields_ = [(name, ctypes.c_uint8) for name in ("arready", "rvalid", "rlast", "rresp")] + [
        ("rid", ctypes.c_uint32),
        ("rdata", ctypes.c_uint8 * 64),
    ]


class WritePins(ctypes.Structure):
    """What the memory drives on a write port in the next cycle."""

    _fields_ = [(name, ctypes.c_uint8) for name in ("awready", "wready", "bvalid", "bresp")] + [
        ("bid", ctypes.c_uint32)
    ]


class ReadRequest(NamedTuple):
    """What a read master drove in the cycle that just ended."""

    valid: int
    addr: int
    len: int
    size: int
    burst: int
    id: int
    ready: int


class WriteRequest(NamedTuple):
    """What a write master drove in the cycle that just ended."""

    valid: int
    addr: int
    len: int
    size: int
    burst: int
    id: int
    wvalid: int
    data: bytes
    strb: int
    last: int
    bready: int


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = shared_library("hbm", "the memory model", SOURCES / "hbm_capi.cpp", SOURCES / "hbm_model.h")
    u64, u32, integer, handle = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p
    signatures: dict[str, tuple[Iterable, object]] = {
        "kv_error": ((), ctypes.c_char_p),
        "kv_new": ((ctypes.c_char_p, u64, u64, u32), handle),
        "kv_delete": ((handle,), None),
        "kv_memory": ((handle,), handle),
        "kv_load": ((handle, ctypes.c_char_p, u64), integer),
        "kv_serve": ((handle, u64, u64, u32, integer), u64),
        "kv_reset": ((handle,), None),
        "kv_stats": ((handle, ctypes.POINTER(Stats)), None),
        "kv_idle": ((handle,), integer),
        "kv_violation": ((handle,), ctypes.c_char_p),
        "kv_read_clock": (
            (handle, u64, integer, u64, u32, u32, u32, u32, integer, ctypes.POINTER(ReadPins)),
            None,
        ),
        "kv_write_clock": (
            (handle, u64, integer, u64, u32, u32, u32, u32, integer, ctypes.c_char_p, u64, integer, integer)
            + (ctypes.POINTER(WritePins),),
            None,
        ),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = list(arguments), result
    return library


class MemoryChannel:
    """One pseudo-channel: contents, timing, one read and one write port.

    `base` is the byte address of its first byte, `number` the channel's, which sets the phase of its refresh.

    Raises KVStrataError for a model that the C++ side refuses.
    """

    def __init__(self, model: MemoryModel, *, size: int = CHANNEL_BYTES, base: int = 0, number: int = 0):
        self._library = _library()
        self.size = size
        self._handle = self._library.kv_new(model.to_text().encode(), size, base, number)
        if not self._handle:
            raise KVStrataError(f"the memory model refused: {self._library.kv_error().decode()}")
        start = self._library.kv_memory(self._handle)
        self.contents = memoryview((ctypes.c_uint8 * size).from_address(start)).cast("B")
        self._read, self._write = ReadPins(), WritePins()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.kv_delete(self._handle)
            self._handle = None

    def load(self, path: Path, offset: int = 0) -> None:
        """Map an image file (copy on write) at byte `offset`; raises KVStrataError if it does not fit."""
        if self._library.kv_load(self._handle, str(path).encode(), offset):
            raise KVStrataError(self._library.kv_error().decode())

    def serve(self, cycle: int, address: int, nbytes: int, *, write: bool = False) -> int:
        """Cycle in which an access that arrives in `cycle` is complete: DRAM timing alone, without a port."""
        return self._library.kv_serve(self._handle, cycle, address, nbytes, write)

    def clock_read(self, cycle: int, request: ReadRequest) -> ReadPins:
        """One cycle of the read port: what the master drove in `cycle`, to what the memory drives in the next."""
        self._library.kv_read_clock(self._handle, cycle, *request, ctypes.byref(self._read))
        return self._read

    def clock_write(self, cycle: int, request: WriteRequest) -> WritePins:
        """One cycle of the write port, as `clock_read`."""
        padded = request._replace(data=request.data.ljust(64, b"\0"))
        self._library.kv_write_clock(self._handle, cycle, *padded, ctypes.byref(self._write))
        return self._write

    def reset(self) -> None:
        """Forget all bursts, as a reset of the whole memory system does; contents stay."""
        self._library.kv_reset(self._handle)

    @property
    def idle(self) -> bool:
        """No burst is in flight."""
        return bool(self._library.kv_idle(self._handle))

    @property
    def stats(self) -> Stats:
        """A snapshot of the counts so far."""
        snapshot = Stats()
        self._library.kv_stats(self._handle, ctypes.byref(snapshot))
        return snapshot

    @property
    def violation(self) -> str | None:
        """The first breach of AXI by the master, or None."""
        text = self._library.kv_violation(self._handle)
        return text.decode() if text else None
