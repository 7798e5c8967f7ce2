"""Stream payloads of the flash side, built from the records of `golden.spec.storage`."""

from amaranth import ShapeLike
from amaranth.lib import data, wiring
from amaranth.lib.wiring import Out

from golden.spec.storage import (
    CHANNEL_BEAT,
    FILTER_DESCRIPTOR,
    FLASH_READ,
    PAGE_BEAT,
    PAGE_BEATS,
    PPN,
    SLOT_BITS,
    Record,
)


def layout_of(record: Record) -> data.StructLayout:
    """The record's fields as a structure, the first in the lowest bits; widths as in the record."""
    return data.StructLayout(dict(record.fields))


def flow(shape: ShapeLike) -> wiring.Signature:
    """A stream that is never refused: what is `valid` has been taken at the end of the cycle."""
    return wiring.Signature({"valid": Out(1), "payload": Out(shape)})


SLOTS = 1 << SLOT_BITS
"""Pages of a kernel that a channel may send, or has sent and the kernel has not taken."""
DESCRIPTOR = data.StructLayout({**dict(FILTER_DESCRIPTOR.fields), "last_row": range(PAGE_BEATS)})
"""A filter descriptor and the number of the last of the beats that pass."""
CHANNEL = layout_of(CHANNEL_BEAT)
COMMAND = data.StructLayout({**dict(FLASH_READ.fields), "ppn": layout_of(PPN)})
PAGE = layout_of(PAGE_BEAT)
