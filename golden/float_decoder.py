"""The decoder in floating point: the reference, and the algorithm level (formats and policies, float arithmetic)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from golden.decoder import Decoder
from golden.formats.weights import QuantisedWeight
from golden.loaders.checkpoint import LINEARS, Checkpoint
from golden.ops import rope_angles


class FloatCache:
    """K (rotated) and V of one sequence, [Hkv, length, dh] per layer."""

    def __init__(self, layers: int) -> None:
        self.length = 0
        self.k: list[Tensor | None] = [None] * layers
        self.v: list[Tensor | None] = [None] * layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store tokens [Hkv, T, dh]; the whole layer's K and V."""
        old_k, old_v = self.k[layer], self.v[layer]
        new_k = k if old_k is None else torch.cat((old_k, k), 1)
        new_v = v if old_v is None else torch.cat((old_v, v), 1)
        self.k[layer], self.v[layer] = new_k, new_v
        return new_k, new_v


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """RoPE on interleaved pairs of [..., T, dh]."""
    angles = rope_angles(positions, x.shape[-1], base)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    x0, x1 = x[..., 0::2], x[..., 1::2]
    return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1).flatten(-2)


class FloatDecoder(Decoder):
    """Llama in float32 or float64. `weights` replaces matrices by name (dequantised codes, for example)."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        weights: dict[str, QuantisedWeight] | None = None,
    ) -> None:
        super().__init__(checkpoint.config)
        replaced = weights or {}
        names = [
            f"layers.{i}.{n}" for i in range(self.config.layers) for n in (*LINEARS, "attn_norm", "ffn_norm")
        ]
        names += [*{"embed", checkpoint.head_name}, "norm"]
        self.tensors = {
            n: (replaced[n].dequantise() if n in replaced else checkpoint.float32(n)).to(dtype) for n in names
        }
        self._head_name = checkpoint.head_name

    def new_cache(self) -> FloatCache:
        """An empty cache."""
        return FloatCache(self.config.layers)

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding."""
        return self.tensors["embed"][tokens]

    def norm(self, layer: int, name: str, x: Tensor) -> Tensor:
        """x / sqrt(mean(x**2) + eps) * weight."""
        weight = self.tensors["norm" if name == "final" else f"layers.{layer}.{name}_norm"]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_eps) * weight

    def linear(self, layer: int, names: Sequence[str], x: Tensor) -> list[Tensor]:
        """x @ W.T."""
        found = []
        for name in names:
            y = x @ self.tensors[self._head_name if name == "head" else f"layers.{layer}.{name}"].T
            self._observe(layer, f"linear.{name}", x=x, y=y)
            found.append(y)
        return found

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache: FloatCache) -> Tensor:
        """Causal softmax attention with grouped query heads."""
        c, steps = self.config, q.shape[0]
        positions = torch.arange(cache.length, cache.length + steps)
        q, k, v = (x.view(steps, -1, c.head_size).transpose(0, 1) for x in (q, k, v))
        q, k = (rotate(x, positions, c.rope_base) for x in (q, k))
        all_k, all_v = cache.append(layer, k, v)
        live = torch.arange(all_k.shape[1])[None, :] <= positions[:, None]
        grouped = q.unflatten(0, (c.kv_heads, c.group))
        z = (grouped @ all_k.transpose(-1, -2)[:, None]) / c.head_size**0.5
        y = (z.masked_fill(~live, -torch.inf).softmax(-1) @ all_v[:, None]).flatten(0, 1)
        self._observe(layer, "attention", q=q, k=all_k, v=all_v, y=y)
        return y.transpose(0, 1).reshape(steps, -1)

    def gate(self, layer: int, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        return torch.nn.functional.silu(gate) * up

    def add(self, layer: int, name: str, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        return x + y

    def real_logits(self, logits: Tensor) -> Tensor:
        """As float64."""
        return logits.double()
