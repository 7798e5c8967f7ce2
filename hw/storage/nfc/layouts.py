"""Stream payloads of the flash side, built from the records of `golden.spec.storage`."""

from amaranth.lib import data

from golden.spec.storage import CHANNEL_BEAT, FILTER_DESCRIPTOR, PAGE_BEAT, Record


def layout_of(record: Record) -> data.StructLayout:
    """The record's fields as a structure, the first in the lowest bits; widths as in the record."""
    return data.StructLayout(dict(record.fields))


DESCRIPTOR = layout_of(FILTER_DESCRIPTOR)
CHANNEL = layout_of(CHANNEL_BEAT)
PAGE = layout_of(PAGE_BEAT)
