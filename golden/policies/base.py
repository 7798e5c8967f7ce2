"""The policy interface, and dense attention.

Letters: Hkv KV heads, G query heads per KV head, T queries, S tokens, dh head size. Mask polarity: true takes part.
Policies see K and V as stored (already quantised, if the representation quantises) and never the current token's
future: a token at a later position than the query is dead in every policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from golden.spec.policies import DenseCosts, PolicyCosts, Selection


@dataclass(frozen=True)
class Heads:
    """Queries of one step and the cache of one layer.

    q, q_raw: [Hkv, G, T, dh] after and before RoPE; k, k_raw, v: [Hkv, S, dh]; positions: [T] of the queries;
    rotate(x, positions): RoPE of [..., T, dh].
    """

    q: Tensor
    q_raw: Tensor
    k: Tensor
    k_raw: Tensor
    v: Tensor
    positions: Tensor
    rotate: Callable[[Tensor, Tensor], Tensor]

    @property
    def causal(self) -> Tensor:
        """bool [T, S]: tokens not later than the query."""
        return torch.arange(self.k.shape[1])[None, :] <= self.positions[:, None]

    @property
    def scale(self) -> float:
        """1 / sqrt(dh)."""
        return self.q.shape[-1] ** -0.5


@dataclass(frozen=True)
class Selected:
    """tokens: bool [Hkv, T, S]; channels: bool [Hkv, T, dh], or None where a policy ranks none;
    weights: whatever `attend` wants back from `select`."""

    tokens: Tensor
    channels: Tensor | None = None
    weights: Tensor | None = None


class KVPolicy(ABC):
    """What a prompt's tokens attend to (`prefill`), what a step selects and attends to, what storage must keep."""

    costs: PolicyCosts

    def prefill(self) -> KVPolicy:
        """The policy of the prompt's own tokens; itself unless it says otherwise."""
        return self

    @abstractmethod
    def select(self, heads: Heads) -> Selected:
        """Which stored tokens take part, per KV head and query."""

    @abstractmethod
    def attend(self, heads: Heads, selected: Selected) -> Tensor:
        """Outputs [Hkv, G, T, dh]."""

    def kept(self, length: int) -> Tensor:
        """bool [length]: tokens that any later step may read; others may be evicted now."""
        return torch.ones(length, dtype=torch.bool)

    def dense_limit(self, context: int) -> Self:
        """The same policy at the setting where it must equal dense attention up to `context`."""
        limited = object.__new__(type(self))
        limited.__dict__.update(self.__dict__)
        limited.costs = self.costs.dense_limit(context)
        return limited

    def records(self, heads: Heads, selected: Selected, layer: int = 0) -> Iterator[Selection]:
        """The selection record of each query and KV head."""
        for head in range(selected.tokens.shape[0]):
            for i, position in enumerate(heads.positions.tolist()):
                channels = () if selected.channels is None else _true(selected.channels[head, i])
                yield Selection(position, layer, head, channels, _true(selected.tokens[head, i]))


def _true(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[:, 0].tolist())


def softmax_mix(z: Tensor, live: Tensor, v: Tensor) -> Tensor:
    """softmax over live slots times v: z [Hkv, G, T, S], live broadcastable to it, v [Hkv, S, dh]."""
    return z.masked_fill(~live, -torch.inf).softmax(-1) @ v[:, None]


class Dense(KVPolicy):
    """Every token up to the query."""

    def __init__(self, head_size: int, group: int = 1) -> None:
        self.costs = DenseCosts(head_size, group)

    def select(self, heads: Heads) -> Selected:
        """All."""
        causal = heads.causal
        return Selected(causal.expand(heads.k.shape[0], *causal.shape))

    def attend(self, heads: Heads, selected: Selected) -> Tensor:
        """Softmax attention."""
        z = heads.q @ heads.k.transpose(-1, -2)[:, None] * heads.scale
        return softmax_mix(z, selected.tokens[:, None], heads.v)
