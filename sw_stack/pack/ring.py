"""Which tokens the engine's KV cache keeps when it does not keep all: first ones, and a ring of recent ones."""

from __future__ import annotations

from dataclasses import dataclass

from golden.lambda_window import LambdaWindow
from golden.spec import KVStrataError
from golden.spec.formats import ATTN_TILE
from golden.storage.decoder import Split


@dataclass(frozen=True)
class KVRing:
    """`sinks` first and `window` last tokens; a new token takes the place of the oldest of the window.

    limit 0: the tokens between are in a drive (`Split`): sinks and window follow each other.
    limit D: nothing else is kept (`LambdaWindow`, docs/formats.md 8.1): the ring holds every recent token behind a tile
    with un-rotated copies of the sinks, which are scored as if D tokens away.
    """

    sinks: int
    window: int
    limit: int = 0

    @classmethod
    def of_split(cls, split: Split) -> KVRing:
        """The engine's part of FPGA+CSD."""
        return cls(split.sinks, split.window)

    @classmethod
    def of_lambda(cls, shape: LambdaWindow) -> KVRing:
        """KVStrataError unless the window fills its ring: the live slots are then one stretch."""
        if shape.ring != shape.window:
            raise KVStrataError(
                f"a compiled Lambda window is a multiple of {ATTN_TILE} tokens and fills its ring; got a window of "
                f"{shape.window} in a ring of {shape.ring}"
            )
        return cls(shape.sinks, shape.window, shape.limit)

    @property
    def sink_slots(self) -> int:
        """Slots of the sinks' own tile, in front of the ring."""
        return ATTN_TILE if self.limit and self.sinks else 0

    def ring_slots(self, context: int) -> int:
        """Slots behind the sinks' tile that a context can take."""
        return min(context, self.window if self.limit else self.sinks + self.window)

    def place(self, token: int) -> int:
        """Slot of a token, counted from the end of the sinks' tile."""
        return token % self.window if self.limit else Split(self.sinks, self.window).slot(token)

    def live(self, tokens: int) -> int:
        """Slots behind the sinks' tile that hold tokens."""
        return self.ring_slots(tokens)

    def live_sinks(self, tokens: int) -> int:
        """Slots of the sinks' tile that take part: those of sinks that have left the window."""
        return max(0, min(self.sinks, tokens - self.window)) if self.limit else 0
