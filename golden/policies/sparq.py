"""SparQ attention, and SparF: the same mathematics over flash pages (algorithm level, float arithmetic).

Grouped queries share channels and tokens: |q| is summed over the group before the r largest are taken, approximate
scores are summed before the k largest (SparQ's own code). Ties go to the lower index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from golden.policies.base import Dense, Heads, KVPolicy, Selected
from golden.spec.policies import SparfCosts, SparqCosts


def largest(keys: Tensor, count: Tensor | int) -> Tensor:
    """bool like keys: the `count` largest along the last axis, the lower index among equals."""
    order = torch.sort(keys, dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(keys.shape[-1]).expand(order.shape).contiguous()
    )
    return rank < count


def running_mean(v: Tensor, positions: Tensor) -> Tensor:
    """v-bar [Hkv, T, dh]: mean of v [Hkv, S, dh] over the tokens up to each of T consecutive positions."""
    first, end = int(positions[0]), int(positions[-1]) + 1
    sums = torch.cat((v[:, : first + 1].sum(1, keepdim=True), v[:, first + 1 : end]), 1).cumsum(1)
    return sums / (positions + 1)[:, None]


class Sparq(KVPolicy):
    """out = alpha * softmax(q K[j]) V[j] + (1 - alpha) * v-bar.

    i: the r largest |q|; s-hat = softmax(q[i] K[i] / sqrt(dh * ||q[i]||1 / ||q||1)); j: the local window and the
    largest s-hat, k in all; alpha = sum of s-hat over j; v-bar: mean of V over the tokens so far.
    """

    costs: SparqCosts

    def __init__(
        self, head_size: int, group: int = 1, r: int = 16, k: int = 0, ratio: float = 0.125, local: int = 0
    ) -> None:
        self.costs = SparqCosts(head_size, group, r=r, tokens=k, ratio=ratio, local=local)

    def prefill(self) -> KVPolicy:
        """A prompt is computed densely; selection starts with the first decode step."""
        return Dense(self.costs.head_size, self.costs.group)

    def select(self, heads: Heads) -> Selected:
        """Channels, then tokens; `weights` is alpha [Hkv, G, T]."""
        channels = largest(heads.q.abs().sum(1), self.costs.r)
        z = self._approximate(heads, channels)
        approximate = z.masked_fill(~heads.causal, -torch.inf).softmax(-1)
        s = heads.positions + 1
        k, window = (torch.tensor([f(n) for n in s.tolist()]) for f in (self.costs.k, self.costs.window))
        tokens = torch.arange(heads.k.shape[1])
        local = tokens[None, :] > (heads.positions - window)[:, None]
        keys = (
            self._pooled(z, approximate).masked_fill(local, torch.inf).masked_fill(~heads.causal, -torch.inf)
        )
        chosen = largest(keys, k[:, None])
        alpha = (approximate * chosen[:, None]).sum(-1)
        # All tokens chosen: alpha is one by definition, not by the rounding of a softmax.
        alpha = torch.where(k >= s, torch.ones_like(alpha), alpha)
        return Selected(chosen, channels, alpha)

    def _approximate(self, heads: Heads, channels: Tensor) -> Tensor:
        """Approximate scores [Hkv, G, T, S]; s-hat is their softmax."""
        q = heads.q * channels[:, None]
        share = q.abs().sum(-1) / heads.q.abs().sum(-1).clamp(min=torch.finfo(q.dtype).tiny)
        scale = (heads.q.shape[-1] * share).clamp(min=torch.finfo(q.dtype).tiny).rsqrt()
        return q @ heads.k.transpose(-1, -2)[:, None] * scale[..., None]

    def _pooled(self, z: Tensor, approximate: Tensor) -> Tensor:
        """Keys [Hkv, T, S] that rank tokens for a group: the sum of its s-hat."""
        return approximate.sum(1)

    def attend(self, heads: Heads, selected: Selected) -> Tensor:
        """Exact attention over the chosen tokens, mixed with v-bar."""
        z = heads.q @ heads.k.transpose(-1, -2)[:, None] * heads.scale
        exact = z.masked_fill(~selected.tokens[:, None], -torch.inf).softmax(-1) @ heads.v[:, None]
        v_bar = running_mean(heads.v, heads.positions)
        assert selected.weights is not None
        alpha = selected.weights[..., None]
        return alpha * exact + (1 - alpha) * v_bar[:, None]


class Sparf(Sparq):
    """SparQ with InstInfer's pages: whole pages are read, and a group of queries ranks tokens by the sum of its scores
    before the softmax, as the drive does (docs/formats-storage.md); a single query gives SparQ's result."""

    costs: SparfCosts

    def __init__(
        self,
        head_size: int,
        group: int = 1,
        r: int = 16,
        k: int = 0,
        ratio: float = 0.125,
        local: int = 0,
        m: int = 4,
    ) -> None:
        self.costs = SparfCosts(head_size, group, r=r, tokens=k, ratio=ratio, local=local, m=m)

    def _pooled(self, z: Tensor, approximate: Tensor) -> Tensor:
        """The sum of the group's scores: no softmax must end before the ranking starts."""
        return z.sum(1)
