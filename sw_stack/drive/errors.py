"""Errors of the drive: one class per status, so that a caller can tell a full drive from a lost page.

The controller turns an exception into the status and detail of a completion; the driver turns them back into
the same class. A class therefore carries all that crosses the wire: its `status` and one 32-bit `detail`.
"""

from __future__ import annotations

from typing import ClassVar

from golden.spec import KVStrataError
from golden.spec.nvme import Status


class DriveError(KVStrataError):
    """A command failed with a status; `detail` is the offending address, field or index."""

    status: ClassVar[Status] = Status.INTERNAL_ERROR
    rule: ClassVar[str] = "the drive reported an internal error"

    def __init__(self, detail: int = 0, message: str | None = None) -> None:
        self.detail = detail
        super().__init__(message or f"{self.rule}; got detail {detail:#010x} (status {self.status:#05x})")


class InvalidCommand(DriveError):
    """The opcode is none that the drive executes."""

    status = Status.INVALID_OPCODE
    rule = "the drive executes read, write, config, append, attend and reclaim"


class InvalidField(DriveError):
    """A field has a value that the command does not allow; `detail` is its dword."""

    status = Status.INVALID_FIELD
    rule = "a command field is outside its range"


class TransferError(DriveError):
    """A PRP does not name mapped host memory."""

    status = Status.DATA_TRANSFER_ERROR
    rule = "a data pointer lies outside the mapped host memory"


class AddressOutOfRange(DriveError):
    """A logical address names a layer, head or group that the configuration does not hold."""

    status = Status.ADDRESS_OUT_OF_RANGE
    rule = "a logical address lies outside the configured task"


class DriveFull(DriveError):
    """No erased block is left; nothing of the command was written."""

    status = Status.CAPACITY_EXCEEDED
    rule = "the drive has no erased block left"


class WriteFault(DriveError):
    """A page could not be programmed in any block."""

    status = Status.WRITE_FAULT
    rule = "a page could not be programmed"


class UnrecoveredRead(DriveError):
    """A page failed ECC after retries and no second copy could rebuild it."""

    status = Status.UNRECOVERED_READ
    rule = "a page cannot be read and has no second copy"


class NotConfigured(DriveError):
    """The task was never configured or has been reclaimed."""

    status = Status.NOT_CONFIGURED
    rule = "a task must be configured before it is used"


class Unmapped(DriveError):
    """A group was never written, was reclaimed, or was lost with the power."""

    status = Status.UNMAPPED
    rule = "a group that holds no data was read"


class NotSequential(DriveError):
    """A write leaves a gap or overwrites."""

    status = Status.NOT_SEQUENTIAL
    rule = "writes continue a sequence at its next token"


class ContextFull(DriveError):
    """The sequence reached the configured maximum of tokens."""

    status = Status.CONTEXT_FULL
    rule = "a sequence exceeds the context that its task was configured for"


class TopKRange(DriveError):
    """r or k of a sparse attend exceeds the head size or the tokens attended to."""

    status = Status.TOP_K_RANGE
    rule = "r must not exceed the head size nor k the number of tokens"


class PartialBatch(DriveError):
    """Some sequences of a batch failed; the driver reports them one by one."""

    status = Status.PARTIAL_BATCH
    rule = "some sequences of the batch failed"


BY_STATUS: dict[int, type[DriveError]] = {
    cls.status: cls
    for cls in (
        InvalidCommand,
        InvalidField,
        TransferError,
        AddressOutOfRange,
        DriveFull,
        WriteFault,
        UnrecoveredRead,
        NotConfigured,
        Unmapped,
        NotSequential,
        ContextFull,
        TopKRange,
        PartialBatch,
        DriveError,
    )
}


def from_status(status: int, detail: int) -> DriveError:
    """The exception of a non-zero completion status; unknown codes are internal errors that show the code."""
    if status in BY_STATUS:
        return BY_STATUS[status](detail)
    return DriveError(
        detail, f"the drive returned an unknown status {status:#05x}; got detail {detail:#010x}"
    )
