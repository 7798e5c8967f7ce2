"""The decoder's skeleton: one order of operators, two arithmetics (golden.float_decoder, golden.exact_decoder).

Letters: T tokens of a step (over all sequences of the batch), V vocabulary, Hq/Hkv query and KV heads, dh head
size. A batch is a list of (tokens, cache); sequences may have different lengths. Matrix products see the
tokens of all sequences at once, attention sees one sequence at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from golden.config import DecoderConfig
from golden.spec import KVStrataError

Probe = Callable[[int, str, dict[str, Any]], None]
"""Called as probe(layer, operator, operands): every operand of a run can be taken out for a hardware check.

Operators: `linear.{q,k,v,o,gate,up,down,head}`, `norm.{attn,ffn,final}`, `rope.{q,k}`, `kv`, `attention`,
`gate`, `relu`, `residual.{attn,ffn}`; layer is -1 for the final norm and the head.
"""

CHUNK_TOKENS = 512
"""Tokens per pass: bounds memory; results do not depend on it."""


class Decoder(ABC):
    """A decoder with an incremental KV cache: prefill and step-by-step give the same results."""

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        self.probe: Probe | None = None

    # --- arithmetic of the level ----------------------------------------------------------------------
    @abstractmethod
    def new_cache(self) -> Any:
        """An empty KV cache of one sequence, with a `length` in tokens."""

    @abstractmethod
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Rows [T, hidden] of the embedding, with the learned positions of a model that has them."""

    @abstractmethod
    def norm(self, layer: int, name: str, x: Tensor) -> Tensor:
        """Norm `attn`, `ffn` or `final` of [T, hidden]."""

    @abstractmethod
    def linear(self, layer: int, names: Sequence[str], x: Tensor) -> list[Tensor]:
        """Matrix products [T, N] of one input with several weights (the input is quantised once), with their biases."""

    @abstractmethod
    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> Tensor:
        """[T, Hq*dh] of one sequence; appends k and v [T, Hkv*dh] to the cache's layer first."""

    @abstractmethod
    def gate(self, layer: int, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""

    @abstractmethod
    def relu(self, layer: int, x: Tensor) -> Tensor:
        """max(x, 0)."""

    @abstractmethod
    def add(self, layer: int, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Residual sum."""

    @abstractmethod
    def real_logits(self, logits: Tensor) -> Tensor:
        """Logits of this level as float64."""

    # --- the decoder ----------------------------------------------------------------------------------
    def forward(self, tokens: Tensor | Sequence[int], cache: Any, last_only: bool = False) -> Tensor:
        """Logits [T, V] (or [1, V]) of one sequence's next tokens, in this level's own number format."""
        hidden = self.hidden(tokens, cache)
        return self.logits(hidden[-1:] if last_only else hidden)

    def hidden(self, tokens: Tensor | Sequence[int], cache: Any) -> Tensor:
        """Vectors [T, hidden] after the last layer of one sequence's next tokens."""
        ids = self._check_tokens(tokens, cache)
        return torch.cat([self._layers([(part, cache)]) for part in ids.split(CHUNK_TOKENS)])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] of vectors after the last layer, in this level's own number format."""
        return self._head(hidden)

    def forward_batch(self, batch: Sequence[tuple[Tensor | Sequence[int], Any]]) -> list[Tensor]:
        """Logits of the last token [V] of each sequence of a batch, computed together."""
        checked = [(self._check_tokens(tokens, cache), cache) for tokens, cache in batch]
        ends = torch.cumsum(torch.tensor([len(ids) for ids, _ in checked]), 0) - 1
        return list(self._head(self._layers(checked)[ends]))

    def _check_tokens(self, tokens: Tensor | Sequence[int], cache: Any) -> Tensor:
        ids = torch.as_tensor(tokens, dtype=torch.int64)
        if ids.ndim != 1 or not len(ids):
            raise KVStrataError(f"a step must be given at least one token, got shape {tuple(ids.shape)}.")
        if ids.min() < 0 or ids.max() >= self.config.vocab:
            bad = ids[(ids < 0) | (ids >= self.config.vocab)][0].item()
            raise KVStrataError(f"a token id must lie in 0..{self.config.vocab - 1}, got {bad}.")
        if cache.length + len(ids) > self.config.context:
            raise KVStrataError(
                f"prompt and answer must fit the context of {self.config.context} tokens, "
                f"got {cache.length + len(ids)}."
            )
        return ids

    def _layers(self, batch: Sequence[tuple[Tensor, Any]]) -> Tensor:
        positions = [torch.arange(cache.length, cache.length + len(ids)) for ids, cache in batch]
        x = self.embed(torch.cat([ids for ids, _ in batch]), torch.cat(positions))
        for layer in range(self.config.layers):
            x = self.layer(layer, x, batch)
        for ids, cache in batch:
            cache.length += len(ids)
        return x

    def layer(self, layer: int, x: Tensor, batch: Sequence[tuple[Tensor, Any]]) -> Tensor:
        """One layer of vectors [T, hidden] of a batch's tokens; K and V go to the caches, whose length stays."""
        sizes = [len(ids) for ids, _ in batch]
        q, k, v = self.linear(layer, ("q", "k", "v"), self.norm(layer, "attn", x))
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), batch)
        mixed = torch.cat([self.attention(layer, qs, ks, vs, cache) for qs, ks, vs, (_, cache) in parts])
        x = self.add(layer, "attn", x, self.linear(layer, ("o",), mixed)[0])
        units = self._units(layer, self.norm(layer, "ffn", x))
        return self.add(layer, "ffn", x, self.linear(layer, ("down",), units)[0])

    def _units(self, layer: int, x: Tensor) -> Tensor:
        """The feed-forward network's hidden units [T, ffn]."""
        if not self.config.gated:
            return self.relu(layer, self.linear(layer, ("up",), x)[0])
        gate, up = self.linear(layer, ("gate", "up"), x)
        return self.gate(layer, gate, up)

    def _head(self, x: Tensor) -> Tensor:
        return self.linear(-1, ("head",), self.norm(-1, "final", x))[0]

    def _observe(self, layer: int, operator: str, **operands: Any) -> None:
        if self.probe is not None:
            self.probe(layer, operator, operands)
