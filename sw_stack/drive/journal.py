"""What firmware writes to its journal before it acts: configurations and reclaims, ordered against page programs."""

from __future__ import annotations

from dataclasses import dataclass

from golden.spec.nvme import AddressMap
from sw_stack.drive.shape import TaskShape


@dataclass(frozen=True)
class Span:
    """A rectangle of a task: start and count per axis; a count of 0 means all that follow."""

    task: int
    batch: int = 0
    batches: int = 0
    layer: int = 0
    layers: int = 0
    head: int = 0
    heads: int = 0
    group: int = 0
    groups: int = 0

    def covers_task(self, shape: TaskShape | None) -> bool:
        """True where the rectangle is all sequences of the task from their first token on."""
        return self.covers_sequences(shape) and not (self.batch or self.batches)

    def covers_sequences(self, shape: TaskShape | None) -> bool:
        """True where the rectangle takes its sequences whole."""
        layers = self.layer == 0 and (shape is None or self.layers in (0, shape.layers))
        return layers and not (self.group or self.groups)


@dataclass(frozen=True)
class Configured:
    """A task was opened after `clock` pages had been programmed."""

    clock: int
    task: int
    shape: TaskShape
    address_map: AddressMap


@dataclass(frozen=True)
class Reclaimed:
    """A rectangle was invalidated after `clock` pages had been programmed."""

    clock: int
    span: Span


Record = Configured | Reclaimed
