"""Where attention happens: on the engine, in the drive, or split between the two.

The engine computes projections and feed-forward networks in every placement; `csd` sends q, k and v of each layer to
the drive and takes the attention output back; `engine+csd` keeps sinks and a recent window on the engine and leaves
everything older to the drive, and merges the partials by log-sum-exp. Values cross as binary16 (docs/nvme.md).

Each placement has a golden form (golden.storage.decoder), without drive, maps or commands. Text and logits are equal
bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from golden import attention, ops
from golden.spec.formats import KV_FORMATS
from golden.storage.decoder import Sparsity, Split, engine_partial, half, merged_row
from sw_stack.drive.driver import Driver, Selection

PLACEMENTS = ("engine", "csd", "engine+csd")


class Placement(Protocol):
    """Attention of one layer for T new tokens: q [T, Hq, dh], k and v [T, Hkv, dh], Q16, rotated."""

    def attend(self, layer: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Q16 [T, Hq * dh]; appends k and v first."""
        ...


# --- through the drive ----------------------------------------------------------------------------------
@dataclass
class InStorage:
    """All attention in the drive: dense, or SparF."""

    driver: Driver
    sparsity: Sparsity | None = None
    task: int = 0
    batch: int = 0

    def attend(self, layer: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Placement."""
        key, value = (half(x.transpose(0, 1)) for x in (k, v))
        self.driver.append(self.task, self.batch, layer, key, value)
        rows = []
        for t in range(len(q)):
            tokens = start + t + 1
            selection = Selection(*self.sparsity.at(tokens)) if self.sparsity else None
            result = self.driver.attend(self.task, self.batch, layer, half(q[t])[None], selection, tokens)
            if result.errors:
                raise result.errors[0]
            rows.append(ops.to_q16(result.outputs[0].astype(np.float64)).flatten())
        return torch.stack(rows)


@dataclass
class WindowAndStorage:
    """Sinks and window on the engine (its exact attention, partial), older tokens in the drive."""

    driver: Driver
    split: Split
    kv: str = "kv4"
    task: int = 0
    batch: int = 0
    _recent: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Placement."""
        return torch.cat([self._token(layer, start + t, q[t], k[t], v[t]) for t in range(len(q))])

    def _token(self, layer: int, position: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        known = self._recent.get(layer)
        keys, values = (
            x[None] if known is None else torch.cat([old, x[None]]) for x, old in zip((k, v), known or (k, v))
        )
        older = self.split.older(position + 1)
        leaving = len(keys) - self.split.sinks - self.split.window
        if leaving > 0:
            at = self.split.sinks
            moved = (half(x[at : at + leaving].transpose(0, 1)) for x in (keys, values))
            self.driver.append(self.task, self.batch, layer, *moved)
            keys, values = (torch.cat([x[:at], x[at + leaving :]]) for x in (keys, values))
        self._recent[layer] = keys, values
        engine = engine_partial(q, keys, values, KV_FORMATS[self.kv].bits)
        if not older:
            return attention.finish(engine).flatten()[None]
        result = self.driver.attend(self.task, self.batch, layer, half(q)[None], tokens=older, partial=True)
        if result.errors:
            raise result.errors[0]
        outputs = ops.to_q16(result.outputs[0].astype(np.float64))
        state = (torch.from_numpy(x[0]) for x in (result.maximum, result.sum))
        return merged_row(engine, outputs, *state)
