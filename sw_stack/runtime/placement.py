"""Where attention happens: on the engine, in the drive, or split between the two.

The engine computes projections and feed-forward networks in every placement; `csd` sends q, k and v of each layer to
the drive and takes the attention output back; `engine+csd` keeps sinks and a recent window on the engine and leaves
everything older to the drive; the host merges both by log-sum-exp (docs/nvme.md section 4). Values cross as binary16.

Each placement has a golden form (golden.storage.decoder), without drive, maps or commands. Text and logits are equal
bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from golden import ops
from golden.storage.decoder import EngineShare, Sparsity, Split, half, merge
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
    """The engine's share of attention (sinks and window) merged with the drive's: all tokens between, dense or SparF.

    The drive is given every token but the sinks as it comes, and attends to those that have left the window.
    """

    driver: Driver
    split: Split
    sparsity: Sparsity | None = None
    task: int = 0
    batch: int = 0

    def attend(self, layer: int, position: int, q: Tensor, k: Tensor, v: Tensor, own: EngineShare) -> Tensor:
        """Q16 [1, Hq * dh] of one token's q [Hq, dh], k and v [Hkv, dh], with the engine's share [Hq]."""
        if position >= self.split.sinks:
            self.driver.append(self.task, self.batch, layer, half(k)[:, None], half(v)[:, None])
        older = self.split.older(position + 1)
        if not older:
            return own.y.flatten()[None]
        selection = Selection(*self.sparsity.at(older)) if self.sparsity else None
        result = self.driver.attend(
            self.task, self.batch, layer, half(q)[None], selection, older, partial=True
        )
        if result.errors:
            raise result.errors[0]
        outputs = ops.to_q16(result.outputs[0].astype(np.float64))
        state = (torch.from_numpy(x[0]) for x in (result.maximum, result.sum))
        return merge(own, outputs, *state).flatten()[None]
