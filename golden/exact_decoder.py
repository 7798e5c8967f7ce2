"""The decoder in the engine's integer arithmetic, bit for bit what the RTL computes (docs/formats.md).

Weights are legal QuantisedWeights, so each matrix product is exact in float64 whatever the order of BLAS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from golden import attention, ops
from golden.decoder import Decoder
from golden.engine_form import BIASED, engine_form
from golden.formats.weights import QuantisedWeight, fitting_group, quantise_weight
from golden.lambda_window import LambdaWindow, attend_lambda
from golden.loaders.checkpoint import Checkpoint
from golden.ops import KVCodes
from golden.spec import KVStrataError
from golden.spec.formats import (
    ATTN_TILE,
    KV_CLIP_BITS,
    VEC_FRAC,
    W8,
    KVFormat,
    WeightFormat,
    kv_format,
    weight_format,
)


def engine_weight(checkpoint: Checkpoint, name: str, fmt: WeightFormat) -> QuantisedWeight:
    """A tensor in an engine format: the file's own codes where they are of that format, else rounded to nearest."""
    stored = checkpoint.tensor(name)
    if isinstance(stored, QuantisedWeight):
        if stored.format == fmt:
            return stored
        stored = stored.dequantise()
    return quantise_weight(stored, fitting_group(fmt, stored.shape[1]))


def engine_weights(checkpoint: Checkpoint, fmt: WeightFormat) -> dict[str, QuantisedWeight]:
    """Every matrix of a checkpoint: linears of the layers in `fmt`, embedding and head in w8."""
    c = checkpoint.config
    names = [f"layers.{i}.{name}" for i in range(c.layers) for name in c.linear_shapes()]
    found = {name: engine_weight(checkpoint, name, fmt) for name in names}
    return found | {name: engine_weight(checkpoint, name, W8) for name in {"embed", checkpoint.head_name}}


def ready_made(checkpoint: Checkpoint, weights: dict[str, QuantisedWeight]) -> dict[str, QuantisedWeight]:
    """The weights, if every matrix of the checkpoint is there in its shape; else KVStrataError names the first."""
    c, ends = checkpoint.config, {checkpoint.head_name, "embed"}
    shapes = dict.fromkeys(sorted(ends, reverse=True), (c.vocab, c.hidden))
    for i in range(c.layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in c.linear_shapes().items()}
    for name, shape in shapes.items():
        if name not in weights:
            raise KVStrataError(
                f"ready-made weights are those of the engine form with its {name}, missing here."
            )
        if weights[name].shape != shape:
            raise KVStrataError(f"ready-made {name} must have shape {shape}, got {weights[name].shape}.")
    return weights


def engine_biases(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """q16 biases of an engine form: `layers.{i}.{q,o,up,down}` and `norm`, the final one; none for a model without."""
    if not checkpoint.config.biases:
        return {}
    names = [f"layers.{i}.{n}" for i in range(checkpoint.config.layers) for n in BIASED] + ["norm"]
    return {n: ops.to_q16(checkpoint.float32(f"{n}_bias")) for n in names}


def embedding_rows(
    weight: QuantisedWeight, tokens: Tensor, table: Tensor | None, positions: Tensor
) -> Tensor:
    """q16 [T, hidden]: rows of a w8 embedding, plus rows of a q16 table of positions if there is one."""
    scale = weight.scale[tokens].repeat_interleave(weight.format.group, 1)
    rows = ops.embedding_row(weight.codes[tokens].long(), scale)
    return rows if table is None else ops.residual(rows, table[positions])


class SlotBuffer:
    """K or V of one layer: codes float32 [Hkv, capacity, dh] (exact small integers), fp16 scale and minimum."""

    def __init__(self, kv_heads: int, head_size: int) -> None:
        self._store = self._empty(kv_heads, 0, head_size)

    @staticmethod
    def _empty(kv_heads: int, slots: int, head_size: int) -> KVCodes:
        scalars = (torch.zeros(kv_heads, slots, dtype=torch.float64) for _ in range(2))
        return KVCodes(torch.zeros(kv_heads, slots, head_size), *scalars)

    def write(self, start: int, kv: KVCodes) -> None:
        """Store tokens [Hkv, T, ...] from slot `start`, growing by doubling."""
        end = start + kv.codes.shape[1]
        heads, capacity, dh = self._store.codes.shape
        if end > capacity:
            grown = self._empty(heads, -(-max(end, 2 * capacity) // ATTN_TILE) * ATTN_TILE, dh)
            for new, old in zip(grown, self._store):
                new[:, :capacity] = old
            self._store = grown
        for whole, part in zip(self._store, kv):
            whole[:, start:end] = part

    def view(self, slots: int) -> KVCodes:
        """The first `slots` slots."""
        return KVCodes(*(field[:, :slots] for field in self._store))


class ExactCache:
    """Quantised K and V of one sequence, a slot per token."""

    def __init__(self, layers: int, kv_heads: int, head_size: int) -> None:
        self.length = 0
        self.k = [SlotBuffer(kv_heads, head_size) for _ in range(layers)]
        self.sink_k = [SlotBuffer(kv_heads, head_size) for _ in range(layers)]
        self.v = [SlotBuffer(kv_heads, head_size) for _ in range(layers)]


PRODUCT_BIASES = ("q", "up")
"""Biases that join their product; the others join the residual stream before it."""
RESIDUAL_BIASES = {"attn": "o", "ffn": "down"}
QUERY_BLOCK = 128
"""Queries that attend at once: bounds memory and leaves out tiles beyond their causal end."""


@dataclass(frozen=True)
class Prepared:
    """A matrix ready for exact products: integers float64 [N, K] in units of 2**-24, and where they came from."""

    integers: Tensor
    weight: QuantisedWeight


class ExactDecoder(Decoder):
    """A decoder in integers: a checkpoint's engine form (golden.engine_form).

    Parameters: a checkpoint, the weight format of the layers (`w8`, `w4`, `w2`, `w2s24`) or ready-made
    QuantisedWeights of that form by name, the KV format (`kv4`, `kv8`), a Lambda window (None: dense attention), and
    a K offset int64 q16 [layers, Hkv, dh] taken from rotated keys before they are quantised (None: zero).
    Vectors are q16 int64 [T, n].
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: str | dict[str, QuantisedWeight] = "w4",
        kv: str = "kv4",
        window: LambdaWindow | None = None,
        k_offset: Tensor | None = None,
    ) -> None:
        checkpoint = engine_form(checkpoint)
        super().__init__(checkpoint.config)
        self.window = window
        self._k_offset = self._checked_offset(k_offset)
        if isinstance(weights, str):
            chosen = engine_weights(checkpoint, weight_format(weights))
        else:
            chosen = ready_made(checkpoint, weights)
        self.kv_format: KVFormat = kv_format(kv)
        self.matrices = {name: Prepared(w.integers(), w) for name, w in chosen.items()}
        self._head_name = checkpoint.head_name
        c = self.config
        self.norms = {f"layers.{i}.{n}_norm": self._norm(checkpoint, f"layers.{i}.{n}_norm")
                      for i in range(c.layers) for n in ("attn", "ffn")}  # fmt: skip
        self.norms["norm"] = self._norm(checkpoint, "norm")
        self.biases = engine_biases(checkpoint)
        self.positions = None if c.rotates else ops.to_q16(checkpoint.float32("positions"))

    @property
    def k_offset(self) -> Tensor | None:
        """The K offset; setting it raises KVStrataError for another shape or a value that no key can have."""
        return self._k_offset

    @k_offset.setter
    def k_offset(self, offset: Tensor | None) -> None:
        self._k_offset = self._checked_offset(offset)

    def _checked_offset(self, offset: Tensor | None) -> Tensor | None:
        c, limit = self.config, 1 << (KV_CLIP_BITS - 1)
        shape = (c.layers, c.kv_heads, c.head_size)
        if offset is not None and tuple(offset.shape) != shape:
            raise KVStrataError(f"a K offset must have shape {shape}, got {tuple(offset.shape)}.")
        if offset is not None and (offset < -limit).logical_or(offset >= limit).any():
            raise KVStrataError(
                f"a K offset must lie within +-512, got {offset.abs().max() / (1 << VEC_FRAC)}."
            )
        return offset

    def centred(self, layer: int, k: Tensor) -> Tensor:
        """Rotated keys [Hkv, T, dh] less their offset (section 7)."""
        return k if self._k_offset is None else ops.residual(k, -self._k_offset[layer][:, None])

    @staticmethod
    def _norm(checkpoint: Checkpoint, name: str) -> ops.NormWeight:
        return ops.prepare_norm(checkpoint.float32(name), checkpoint.config.norm_eps)

    def new_cache(self) -> ExactCache:
        """An empty cache."""
        return ExactCache(self.config.layers, self.config.kv_heads, self.config.head_size)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Section 10: q16 rows of the w8 embedding, plus those of learned positions."""
        return embedding_rows(self.matrices["embed"].weight, tokens, self.positions, positions)

    def norm(self, layer: int, name: str, x: Tensor) -> Tensor:
        """Section 5."""
        weight = self.norms["norm" if name == "final" else f"layers.{layer}.{name}_norm"]
        y = ops.rmsnorm(x, weight)
        if name == "final" and "norm" in self.biases:
            y = ops.residual(y, self.biases["norm"])
        self._observe(layer, f"norm.{name}", x=x, weight=weight, y=y)
        return y

    def linear(self, layer: int, names: Sequence[str], x: Tensor) -> list[Tensor]:
        """Sections 2 and 4."""
        a8 = ops.quantise_a8(x)
        return [self._product(layer, name, x, a8) for name in names]

    def _product(self, layer: int, name: str, x: Tensor, a8: ops.A8) -> Tensor:
        matrix = self.matrices[self._head_name if name == "head" else f"layers.{layer}.{name}"]
        acc = ops.accumulate(a8.codes, matrix.integers)
        y = ops.scale_accumulator(acc, a8.mantissa, a8.exponent)
        if name in PRODUCT_BIASES and self.biases:
            y = ops.residual(y, self.biases[f"layers.{layer}.{name}"])
        self._observe(layer, f"linear.{name}", x=x, a8=a8, weight=matrix.weight, acc=acc, y=y)
        return y

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache: ExactCache) -> Tensor:
        """Sections 6, 7 and 8, causal; dense or by the Lambda window."""
        c, start, steps = self.config, cache.length, q.shape[0]
        positions = torch.arange(start, start + steps)
        heads = {"q": q, "k": k, "v": v}
        heads = {n: x.view(steps, -1, c.head_size).transpose(0, 1) for n, x in heads.items()}
        turned = {n: self.rotate(layer, n, heads[n], positions) for n in ("q", "k")}
        self._check_sinks()
        key = self.centred(layer, turned["k"])
        new_k = ops.quantise_kv(key, self.kv_format.bits)
        new_v = ops.quantise_kv(heads["v"], self.kv_format.bits)
        self._observe(layer, "kv", x_k=key, x_v=heads["v"], k=new_k, v=new_v)
        cache.k[layer].write(start, new_k)
        cache.v[layer].write(start, new_v)
        if self.window is None:
            y = self._dense_attention(layer, turned["q"], positions, cache)
        else:
            y = self._lambda_attention(layer, heads, turned["q"], positions, cache)
        return y.transpose(0, 1).reshape(steps, -1)

    def rotate(self, layer: int, name: str, x: Tensor, positions: Tensor) -> Tensor:
        """`q` or `k` [H, T, dh] turned by their positions; as they are without RoPE."""
        if not self.config.rotates:
            return x
        cos, sin = ops.rope_table(positions, self.config.head_size, self.config.rope_base)
        y = ops.rope(x, cos, sin)
        self._observe(layer, f"rope.{name}", x=x, cos=cos, sin=sin, y=y)
        return y

    def _check_sinks(self) -> None:
        if self.k_offset is not None and self.window is not None and self.window.sinks:
            raise KVStrataError(
                f"a K offset shifts all scores of one query alike, so sinks must be 0, got {self.window.sinks}."
            )

    def _dense_attention(self, layer: int, q: Tensor, positions: Tensor, cache: ExactCache) -> Tensor:
        parts = []
        for block in positions.split(QUERY_BLOCK):
            # Later slots are dead for the whole block: dead tiles change nothing and are left out.
            end = int(block[-1]) + 1
            k, v = cache.k[layer].view(end), cache.v[layer].view(end)
            live = torch.arange(end)[None, :] <= block[:, None]
            parts.append(attention.attend(q[:, block - int(positions[0])], k, v, live))
        y = torch.cat(parts, 1)
        live = torch.arange(end)[None, :] <= positions[:, None]
        self._observe(layer, "attention", q=q, k=k, v=v, live=live, y=y)
        return y

    def _lambda_attention(
        self, layer: int, heads: dict[str, Tensor], q: Tensor, positions: Tensor, cache: ExactCache
    ) -> Tensor:
        window = self.window
        assert window is not None
        first, end = int(positions[0]), int(positions[-1]) + 1
        new_sinks = max(0, min(window.sinks, end) - first)
        if new_sinks:
            cache.sink_k[layer].write(first, ops.quantise_kv(heads["k"][:, :new_sinks], self.kv_format.bits))
        q_limit = self.rotate(layer, "q", heads["q"], torch.tensor([window.limit]))
        k, v = cache.k[layer].view(end), cache.v[layer].view(end)
        sink_k = cache.sink_k[layer].view(min(window.sinks, end))
        y = attend_lambda(q, q_limit, k, v, sink_k, positions, window)
        self._observe(layer, "attention", q=q, q_limit=q_limit, k=k, v=v, sink_k=sink_k, window=window, y=y)
        return y

    def gate(self, layer: int, gate: Tensor, up: Tensor) -> Tensor:
        """Section 9."""
        y = ops.gate_product(gate, up)
        self._observe(layer, "gate", gate=gate, up=up, y=y)
        return y

    def relu(self, layer: int, x: Tensor) -> Tensor:
        """Section 9."""
        y = ops.relu(x)
        self._observe(layer, "relu", x=x, y=y)
        return y

    def add(self, layer: int, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Section 10; the bias of the product comes first, as the engine adds it while the product is computed."""
        if self.biases:
            x = ops.residual(x, self.biases[f"layers.{layer}.{RESIDUAL_BIASES[name]}"])
        total = ops.residual(x, y)
        self._observe(layer, f"residual.{name}", x=x, y=y, sum=total)
        return total

    def real_logits(self, logits: Tensor) -> Tensor:
        """Q16 as float64."""
        return logits.double() / (1 << VEC_FRAC)
