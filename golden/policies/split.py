"""Attention over KV that is split among devices: partials merged by log-sum-exp (float arithmetic).

The exact integer form of the engine is golden.attention.merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class FloatPartial(NamedTuple):
    """Maximum m [...] (-inf where nothing is live), l [...] = sum exp(z - m), o [..., dh] = sum exp(z - m) v."""

    m: Tensor
    l: Tensor
    o: Tensor


def partial(z: Tensor, live: Tensor, v: Tensor) -> FloatPartial:
    """Partial of one device's tokens: z [..., T, S] (natural units), live broadcastable, v [..., S, dh]."""
    z = z.masked_fill(~live, -torch.inf)
    m = z.amax(-1)
    p = (z - torch.where(m == -torch.inf, 0.0, m)[..., None]).exp()
    return FloatPartial(m, p.sum(-1), p @ v)


def merge(parts: Sequence[FloatPartial]) -> FloatPartial:
    """Partials of disjoint token sets; the order does not matter beyond float rounding."""
    m = torch.stack([p.m for p in parts]).amax(0)
    safe = torch.where(m == -torch.inf, 0.0, m)
    factors = [(p.m - safe).exp() for p in parts]
    l = sum((f * p.l for f, p in zip(factors, parts)), torch.zeros_like(m))
    o = sum((f[..., None] * p.o for f, p in zip(factors, parts)), torch.zeros_like(parts[0].o))
    return FloatPartial(m, l, o)


def finish(p: FloatPartial) -> Tensor:
    """Outputs [..., dh]; zeros where no token was live anywhere."""
    return torch.where(p.l[..., None] > 0, p.o / p.l.clamp(min=torch.finfo(p.l.dtype).tiny)[..., None], 0.0)
