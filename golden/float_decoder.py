"""The decoder in floating point: the reference, and the algorithm level (formats and policies, float arithmetic)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from golden.decoder import Decoder
from golden.formats.kv import codec
from golden.formats.weights import QuantisedWeight
from golden.loaders.checkpoint import Checkpoint
from golden.ops import from_q16, rope_angles
from golden.policies import Dense, Heads, KVPolicy
from golden.spec import KVStrataError


class FloatCache:
    """K before and after RoPE, and V, of one sequence as stored: [Hkv, capacity, dh] per layer."""

    def __init__(self, layers: int) -> None:
        self.length = 0
        self._stores: list[list[Tensor]] = [[] for _ in range(layers)]

    def append(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Store tokens [Hkv, T, dh] of each kind; all stored tokens of each kind."""
        end = self.length + new[0].shape[1]
        stores = self._stores[layer]
        if not stores or end > stores[0].shape[1]:
            grown = [x.new_zeros(x.shape[0], max(end, 2 * self.length), x.shape[2]) for x in new]
            for old, fresh in zip(stores, grown):
                fresh[:, : self.length] = old[:, : self.length]
            stores[:] = grown
        for store, x in zip(stores, new):
            store[:, self.length : end] = x
        return [store[:, :end] for store in stores]


def a8(x: Tensor) -> Tensor:
    """Each row of [T, n] rounded to 127 steps of its greatest magnitude (docs/formats.md section 2, in float)."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 127
    return torch.floor(x / scale + 0.5) * scale


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """RoPE on interleaved pairs of [..., T, dh]."""
    angles = rope_angles(positions, x.shape[-1], base)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    x0, x1 = x[..., 0::2], x[..., 1::2]
    return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1).flatten(-2)


class FloatDecoder(Decoder):
    """A decoder in float32 or float64.

    Without options: the reference. With them, the algorithm level: `weights` replaces matrices by name (codes or
    pruned floats), `activations="a8"` rounds every matrix product's input to int8 per token, `kv` names a
    representation of golden.formats.kv, `policy` a KV policy (default: dense), `k_offset` (int64 q16 [layers, Hkv, dh])
    is taken from rotated keys before they are stored and given back when they are read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        weights: Mapping[str, Tensor | QuantisedWeight] | None = None,
        activations: str = "float",
        kv: str = "float",
        policy: KVPolicy | None = None,
        k_offset: Tensor | None = None,
    ) -> None:
        super().__init__(checkpoint.config)
        if activations not in ("float", "a8"):
            raise KVStrataError(f"activations must be float or a8, got {activations}.")
        self.activations = activations
        self.codec = codec(kv)
        self.k_offset = k_offset
        self.policy = policy or Dense(self.config.head_size, self.config.group)
        replaced = weights or {}
        parts = (*self.config.linear_shapes(), "attn_norm", "ffn_norm")
        names = [f"layers.{i}.{n}" for i in range(self.config.layers) for n in parts] + ["norm"]
        if self.config.biases:
            names += [f"{n}_bias" for n in names]
        names += [*{"embed", checkpoint.head_name}, *([] if self.config.rotates else ["positions"])]
        chosen = {n: replaced.get(n, checkpoint.tensors.get(n)) for n in names}
        self.tensors = {
            n: (
                w.dequantise()
                if isinstance(w, QuantisedWeight)
                else checkpoint.float32(n)
                if w is None
                else w
            ).to(dtype)
            for n, w in chosen.items()
        }
        self._head_name = checkpoint.head_name

    def new_cache(self) -> FloatCache:
        """An empty cache."""
        return FloatCache(self.config.layers)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Rows of the embedding, plus those of the positions where they are learned."""
        rows = self.tensors["embed"][tokens]
        return rows if self.config.rotates else rows + self.tensors["positions"][positions]

    def norm(self, layer: int, name: str, x: Tensor) -> Tensor:
        """x / sqrt(mean(x**2) + eps) * weight + bias, of x less its mean where the norm is LayerNorm."""
        name = "norm" if name == "final" else f"layers.{layer}.{name}_norm"
        if self.config.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_eps) * self.tensors[name]
        return self._biased(name, y)

    def _biased(self, name: str, y: Tensor) -> Tensor:
        bias = self.tensors.get(f"{name}_bias")
        return y if bias is None else y + bias

    def linear(self, layer: int, names: Sequence[str], x: Tensor) -> list[Tensor]:
        """x @ W.T + bias."""
        found = []
        x = a8(x) if self.activations == "a8" else x
        for name in names:
            tensor = self._head_name if name == "head" else f"layers.{layer}.{name}"
            y = self._biased(tensor, x @ self.tensors[tensor].T)
            self._observe(layer, f"linear.{name}", x=x, y=y)
            found.append(y)
        return found

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache: FloatCache) -> Tensor:
        """The policy's attention over the stored representation, causal, with grouped query heads."""
        c, start, steps = self.config, cache.length, q.shape[0]
        positions = torch.arange(start, start + steps)
        q_raw, k_raw, v = (x.view(steps, -1, c.head_size).transpose(0, 1) for x in (q, k, v))
        q_raw = q_raw.unflatten(0, (c.kv_heads, c.group))
        q, k = (self._rotate(x, positions) for x in (q_raw, k_raw))
        offset = None if self.k_offset is None else from_q16(self.k_offset[layer])[:, None].to(k.dtype)
        key = k if offset is None else k - offset
        stored = cache.append(layer, *(self.codec.new(x) for x in (key, k_raw, v)))
        parts = []
        for first, end in self.codec.blocks(start, start + steps):
            block = slice(first - start, end - start)
            view_k, view_v = self.codec.view(stored[0], stored[2], end)
            view_k = view_k if offset is None else view_k + offset
            heads = Heads(q[:, :, block], q_raw[:, :, block], view_k, stored[1][:, :end], view_v,
                          positions[block], self._rotate)  # fmt: skip
            selected = self.policy.select(heads)
            parts.append(self.policy.attend(heads, selected))
            self._observe(layer, "attention", heads=heads, selected=selected, y=parts[-1])
        return torch.cat(parts, 2).permute(2, 0, 1, 3).reshape(steps, -1)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, positions, self.config.rope_base) if self.config.rotates else x

    def gate(self, layer: int, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        return torch.nn.functional.silu(gate) * up

    def relu(self, layer: int, x: Tensor) -> Tensor:
        """max(x, 0)."""
        return x.clamp(min=0)

    def add(self, layer: int, name: str, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        return x + y

    def real_logits(self, logits: Tensor) -> Tensor:
        """As float64."""
        return logits.double()
