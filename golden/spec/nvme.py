"""NVMe fields of the computational drive: addresses, commands, completions and status codes.

The data plane is the standard read and write with DWord 10 replaced by a 32-bit logical address, as
InstInfer publishes it. The control plane uses vendor opcodes of the NVM command set. An element-granular
address of a large batch needs more than 32 bits, so addresses name *groups* (one flash page of one head each)
and their field widths are set by `config`: `AddressMap`.

A submission entry has 16 dwords, a completion entry 4; little endian; fields are `Field(dword, lsb, width)`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from golden.spec import KVStrataError
from golden.spec.storage import PageKind

SQE_BYTES = 64
CQE_BYTES = 16
HOST_PAGE_BYTES = 4096
"""Memory page of PRP lists (CC.MPS = 0)."""
DOORBELL_BASE = 0x1000
DOORBELL_STRIDE = 4
"""Doorbell of queue q: base + (2 q + (0 submission, 1 completion)) * stride (CAP.DSTRD = 0)."""


class Opcode(enum.IntEnum):
    """Bits 1:0 give the data direction as NVMe demands: 00 none, 01 to the drive, 10 from it, 11 both."""

    WRITE = 0x01
    READ = 0x02
    CONFIG = 0x81
    RECLAIM = 0x84
    APPEND = 0x85
    ATTEND = 0x87


@dataclass(frozen=True)
class Field:
    """`width` bits of one dword starting at bit `lsb`."""

    dword: int
    lsb: int
    width: int

    def put(self, dwords: list[int], value: int, name: str) -> None:
        """Write `value` into its bits of `dwords`; KVStrataError when it does not fit."""
        if not 0 <= value < 1 << self.width:
            raise KVStrataError(f"NVMe field {name} holds {self.width} bits; got {value}")
        dwords[self.dword] |= value << self.lsb

    def get(self, dwords: list[int] | tuple[int, ...]) -> int:
        """Read the value out of `dwords`."""
        return dwords[self.dword] >> self.lsb & ((1 << self.width) - 1)


# --- submission entry -------------------------------------------------------------------------------
SQE_COMMON: dict[str, Field] = {
    "opcode": Field(0, 0, 8),
    "cid": Field(0, 16, 16),
    "nsid": Field(1, 0, 32),
    "prp1_lo": Field(6, 0, 32),
    "prp1_hi": Field(7, 0, 32),
    "prp2_lo": Field(8, 0, 32),
    "prp2_hi": Field(9, 0, 32),
}
"""Where NVMe puts them; PRP1 and PRP2 are 64-bit host addresses split over two dwords."""

SQE_FIELDS: dict[Opcode, dict[str, Field]] = {
    Opcode.READ: {
        "address": Field(10, 0, 32),
        "heads": Field(11, 0, 16),
        "groups": Field(12, 0, 16),
    },
    Opcode.WRITE: {
        "address": Field(10, 0, 32),
        "heads": Field(11, 0, 16),
        "groups": Field(12, 0, 16),
    },
    Opcode.CONFIG: {
        "task": Field(10, 0, 16),
        "layers": Field(10, 16, 16),
        "q_heads": Field(11, 0, 16),
        "kv_heads": Field(11, 16, 16),
        "head_size": Field(12, 0, 16),
        "channels_per_page": Field(12, 16, 16),
        "max_tokens": Field(13, 0, 32),
        "batch_bits": Field(14, 0, 5),
        "layer_bits": Field(14, 5, 5),
        "head_bits": Field(14, 10, 5),
        "group_bits": Field(14, 15, 5),
    },
    Opcode.APPEND: {
        "address": Field(10, 0, 32),
        "tokens": Field(11, 0, 32),
    },
    Opcode.ATTEND: {
        "address": Field(10, 0, 32),
        "batch": Field(11, 0, 16),
        "sparse": Field(11, 16, 1),
        "partial": Field(11, 17, 1),
        "r": Field(12, 0, 16),
        "window": Field(12, 16, 16),
        "k": Field(13, 0, 32),
        "tokens": Field(14, 0, 32),
    },
    Opcode.RECLAIM: {
        "address": Field(10, 0, 32),
        "batch": Field(11, 0, 16),
        "layers": Field(11, 16, 16),
        "heads": Field(12, 0, 16),
        "groups": Field(13, 0, 32),
    },
}
"""Command-specific fields. Counts of zero mean "to the end of the axis"; nothing is zero-based.

`heads`, `groups` of read and write span a rectangle from `address`, head-major in the data buffer.
`append` carries K then V, each [kv_heads, tokens, head_size] fp16, for one layer of one sequence.
`attend` carries q, [batch, q_heads, head_size] fp16, and receives `AttendResult` records behind each other.
"""

# --- completion entry -------------------------------------------------------------------------------
CQE_FIELDS: dict[str, Field] = {
    "result": Field(0, 0, 32),
    "detail": Field(1, 0, 32),
    "sq_head": Field(2, 0, 16),
    "sq_id": Field(2, 16, 16),
    "cid": Field(3, 0, 16),
    "phase": Field(3, 16, 1),
    "status_code": Field(3, 17, 8),
    "status_type": Field(3, 25, 3),
    "retry_not": Field(3, 31, 1),
}
"""`result` counts what was done (tokens held, sequences attended, groups reclaimed); `detail` is the
offender: a logical address, a field's dword, or the batch index of the first failed sequence."""


class Status(enum.IntEnum):
    """`status_type << 8 | status_code`. Types: 0 generic, 1 command specific, 2 media, 7 vendor."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    DATA_TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    ADDRESS_OUT_OF_RANGE = 0x080
    CAPACITY_EXCEEDED = 0x081
    WRITE_FAULT = 0x280
    UNRECOVERED_READ = 0x281
    NOT_CONFIGURED = 0x7C0
    UNMAPPED = 0x7C1
    NOT_SEQUENTIAL = 0x7C2
    """Appends and writes continue a sequence; a gap or an overwrite is refused."""
    CONTEXT_FULL = 0x7C3
    TOP_K_RANGE = 0x7C4
    PARTIAL_BATCH = 0x7C5
    """Some sequences of an `attend` failed; their records say why, the others are valid."""


# --- logical addresses ------------------------------------------------------------------------------
ADDRESS_BITS = 32
VIEW_BITS = 2


@dataclass(frozen=True)
class LogicalAddress:
    """One page: a view of one head of one layer of one sequence (`batch`) of one job (`task`).

    `group` counts pages along the view: token groups for K_TOKEN and V_TOKEN; segment * channel groups +
    channel group for K_CHANNEL. A full context has the same number of pages in each view.
    """

    view: PageKind
    task: int
    batch: int
    layer: int
    head: int
    group: int


@dataclass(frozen=True)
class AddressMap:
    """Field widths of a logical address: view, task, batch, layer, head, group from the top bit down.

    The task field takes what the others leave; KVStrataError when nothing is left.
    """

    batch_bits: int
    layer_bits: int
    head_bits: int
    group_bits: int

    def __post_init__(self) -> None:
        used = VIEW_BITS + self.batch_bits + self.layer_bits + self.head_bits + self.group_bits
        if used >= ADDRESS_BITS:
            raise KVStrataError(
                f"a logical address has {ADDRESS_BITS} bits and needs one for the task; "
                f"view {VIEW_BITS}, batch {self.batch_bits}, layer {self.layer_bits}, head {self.head_bits} "
                f"and group {self.group_bits} take {used}"
            )

    @classmethod
    def for_shape(cls, batch: int, layers: int, kv_heads: int, groups: int) -> AddressMap:
        """The narrowest map that addresses `batch` sequences of `layers` x `kv_heads` x `groups` pages."""
        return cls(*((max(n, 1) - 1).bit_length() for n in (batch, layers, kv_heads, groups)))

    @property
    def task_bits(self) -> int:
        """Width of the task field."""
        return ADDRESS_BITS - VIEW_BITS - self.batch_bits - self.layer_bits - self.head_bits - self.group_bits

    @property
    def widths(self) -> tuple[tuple[str, int], ...]:
        """(field, bits) from the top bit down."""
        return (
            ("view", VIEW_BITS),
            ("task", self.task_bits),
            ("batch", self.batch_bits),
            ("layer", self.layer_bits),
            ("head", self.head_bits),
            ("group", self.group_bits),
        )

    def pack(self, address: LogicalAddress) -> int:
        """The 32-bit word of DWord 10; KVStrataError names a field that does not fit."""
        word = 0
        for name, bits in self.widths:
            value = int(getattr(address, name))
            if not 0 <= value < 1 << bits:
                raise KVStrataError(f"logical address field {name} holds {bits} bits; got {value}")
            word = word << bits | value
        return word

    def unpack(self, word: int) -> LogicalAddress:
        """Inverse of `pack`; KVStrataError on the reserved view."""
        values: dict[str, int] = {}
        for name, bits in reversed(self.widths):
            values[name] = word & ((1 << bits) - 1)
            word >>= bits
        if values["view"] not in list(PageKind):
            raise KVStrataError(f"logical address view is one of 0, 1, 2; got {values['view']}")
        return LogicalAddress(PageKind(values.pop("view")), **values)


# --- data structures in host memory -----------------------------------------------------------------
ATTEND_HEADER_BYTES = 8
"""An attend result record per sequence starts with its status and the offending logical address, 32 bits each."""
ATTEND_STATE_BYTES = 12
"""With `partial`, per query head: maximum (int32, whole log2 units) and sum (uint64, unit 2^-40) of its softmax.

A record is header, then these states if asked for, then the outputs, [q_heads, head_size] fp16.
"""
