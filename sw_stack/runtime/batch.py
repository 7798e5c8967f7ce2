"""Sequences of a batch on an engine device: each step takes one token of each, prompts included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from golden.spec import KVStrataError
from sw_stack.runtime.session import Session


@dataclass
class BatchSession(Session):
    """As many sequences as the map has, with `programs` from `compile_batch`. `lengths`: tokens in each cache."""

    lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lengths = [0] * self.programs.map.sequences

    def forward_batch(self, tokens: Sequence[Sequence[int]]) -> list[torch.Tensor | None]:
        """Append tokens to each sequence; logits Q16 int64 [V] of each one's last, None for one without new tokens.

        KVStrataError naming the sequence, before anything is computed, for what does not fit.
        """
        if len(tokens) != len(self.lengths):
            raise KVStrataError(f"a batch has {len(self.lengths)} sequences; got tokens for {len(tokens)}")
        for index, ids in enumerate(tokens):
            self._check_sequence(index, list(ids))
        found: list[torch.Tensor | None] = [None] * len(tokens)
        for step in range(max(map(len, tokens))):
            row = [ids[step] if step < len(ids) else None for ids in tokens]
            self._step(row)
            ending = [s for s, ids in enumerate(tokens) if step == len(ids) - 1]
            if ending:
                logits = self._logits()
                for s in ending:
                    found[s] = logits[s]
        return found

    def _check_sequence(self, index: int, ids: list[int]) -> None:
        if not ids:
            return
        try:
            self._check(ids, self.lengths[index])
        except KVStrataError as error:
            raise KVStrataError(f"sequence {index} of the batch: {error}") from error

    def _step(self, tokens: list[int | None]) -> None:
        """Attention programs take the registers of their sequence; the others have no position."""
        live = {s: token for s, token in enumerate(tokens) if token is not None}
        region = self.programs.map.regions["input"]
        for s, token in live.items():
            self._write_row(region.at(s), self._embed([token], self.lengths[s])[0])
        for layer in range(self.programs.map.model.layers):
            self._run(f"batch{layer}", 0, 1)
            for s in live:
                self._run(f"attend{layer}.{s}", self.lengths[s], 1)
        self._run(f"batch{self.programs.map.model.layers}", 0, 1)
        for s in live:
            self.lengths[s] += 1

    def _logits(self) -> torch.Tensor:
        self._run("head", 0, 1)
        model = self.programs.map.model
        return self._rows("logits", self.programs.map.sequences, model.vocab)
