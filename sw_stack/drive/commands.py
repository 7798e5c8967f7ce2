"""Typed NVMe commands and completions, and their bytes.

The dataclasses hold values as a driver thinks of them; `encode` and `decode` go through the field table of
`golden.spec.nvme`, so that no offset is written twice. `decode(encode(c)) == c` for every command.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from golden.spec.nvme import (
    CQE_BYTES,
    CQE_FIELDS,
    SQE_BYTES,
    SQE_COMMON,
    SQE_FIELDS,
    Field,
    Opcode,
)
from sw_stack.drive.errors import InvalidCommand


@dataclass(frozen=True)
class Command:
    """A submission without its transport fields (command id and data pointers)."""

    opcode: ClassVar[Opcode]


@dataclass(frozen=True)
class Read(Command):
    """Read a rectangle of `heads` x `groups` pages of one view, head-major."""

    opcode = Opcode.READ
    address: int
    heads: int
    groups: int


@dataclass(frozen=True)
class Write(Command):
    """Write whole token groups of a prefill: as `Read`; K_TOKEN and V_TOKEN views only."""

    opcode = Opcode.WRITE
    address: int
    heads: int
    groups: int


@dataclass(frozen=True)
class Config(Command):
    """Model shape and address map of one task."""

    opcode = Opcode.CONFIG
    task: int
    layers: int
    q_heads: int
    kv_heads: int
    head_size: int
    channels_per_page: int
    max_tokens: int
    batch_bits: int
    layer_bits: int
    head_bits: int
    group_bits: int


@dataclass(frozen=True)
class Append(Command):
    """Append `tokens` new tokens of all heads to one layer of one sequence."""

    opcode = Opcode.APPEND
    address: int
    tokens: int


@dataclass(frozen=True)
class Attend(Command):
    """Attention of one layer for `batch` sequences from `address` on, over their first `tokens`."""

    opcode = Opcode.ATTEND
    address: int
    batch: int
    sparse: int
    partial: int
    r: int
    window: int
    k: int
    tokens: int


@dataclass(frozen=True)
class Reclaim(Command):
    """Invalidate a rectangle of sequences x layers x heads x groups; a count of 0 means all that follow."""

    opcode = Opcode.RECLAIM
    address: int
    batch: int
    layers: int
    heads: int
    groups: int


COMMANDS: dict[int, type[Command]] = {c.opcode: c for c in (Read, Write, Config, Append, Attend, Reclaim)}


@dataclass(frozen=True)
class Submission:
    """A command with its transport fields."""

    command: Command
    cid: int
    prp1: int = 0
    prp2: int = 0


@dataclass(frozen=True)
class Completion:
    """A completion entry; `status` is type << 8 | code, 0 for success."""

    cid: int
    status: int
    result: int
    detail: int
    sq_id: int
    sq_head: int
    phase: int


def _entry(size: int, *parts: tuple[Mapping[str, Field], Mapping[str, int]]) -> bytes:
    """A queue entry of `size` bytes from fields and their values; KVStrataError names a value that does not fit."""
    dwords = [0] * (size // 4)
    for table, values in parts:
        for name, value in values.items():
            table[name].put(dwords, value, name)
    return struct.pack(f"<{len(dwords)}I", *dwords)


def _values(entry: bytes, table: Mapping[str, Field]) -> dict[str, int]:
    dwords = struct.unpack(f"<{len(entry) // 4}I", entry)
    return {name: field.get(dwords) for name, field in table.items()}


def encode(submission: Submission) -> bytes:
    """The 64 bytes of a submission entry; KVStrataError names a field that does not fit."""
    command = submission.command
    values = {"opcode": int(command.opcode), "cid": submission.cid, "nsid": 1}
    for name in ("prp1", "prp2"):
        pointer = getattr(submission, name)
        values |= {f"{name}_lo": pointer & 0xFFFFFFFF, f"{name}_hi": pointer >> 32}
    table = SQE_FIELDS[command.opcode]
    return _entry(SQE_BYTES, (SQE_COMMON, values), (table, {name: getattr(command, name) for name in table}))


def decode(entry: bytes) -> Submission:
    """Inverse of `encode`; InvalidCommand on an opcode that the drive does not know."""
    common = _values(entry, SQE_COMMON)
    cls = COMMANDS.get(common["opcode"])
    if cls is None:
        raise InvalidCommand(common["opcode"])
    command = cls(**_values(entry, SQE_FIELDS[cls.opcode]))
    prp1, prp2 = (common[f"{p}_hi"] << 32 | common[f"{p}_lo"] for p in ("prp1", "prp2"))
    return Submission(command, common["cid"], prp1, prp2)


def encode_completion(completion: Completion) -> bytes:
    """The 16 bytes of a completion entry; a failed command is not to be retried as it is."""
    values = {
        "result": completion.result,
        "detail": completion.detail,
        "sq_head": completion.sq_head,
        "sq_id": completion.sq_id,
        "cid": completion.cid,
        "phase": completion.phase,
        "status_code": completion.status & 0xFF,
        "status_type": completion.status >> 8,
        "retry_not": int(completion.status != 0),
    }
    return _entry(CQE_BYTES, (CQE_FIELDS, values))


def decode_completion(entry: bytes) -> Completion:
    """Inverse of `encode_completion`."""
    v = _values(entry, CQE_FIELDS)
    status = v["status_type"] << 8 | v["status_code"]
    return Completion(v["cid"], status, v["result"], v["detail"], v["sq_id"], v["sq_head"], v["phase"])
