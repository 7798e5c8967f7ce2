"""A sequence on an engine device: embedding rows in, programs and registers, logits out.

The host does what the engine does not: tokenising, embedding rows, choosing a token. Prompts go through the prefill
program in whole aligned passes and through the decode program for the rest; results do not depend on the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from golden.exact_decoder import embedding_rows
from golden.formats.weights import QuantisedWeight
from golden.spec import KVStrataError
from golden.storage.decoder import EngineShare
from sw_stack.compile.decoder import Programs
from sw_stack.compile.program import step_registers
from sw_stack.device.protocol import EngineDevice, RunResult
from sw_stack.runtime.placement import Placement, WindowAndStorage


@dataclass
class Session:
    """One sequence from its first token on. KVStrataError for tokens outside the vocabulary or a full context."""

    device: EngineDevice
    programs: Programs
    embedding: QuantisedWeight
    positions: torch.Tensor | None = None
    """Q16 int64 [context, hidden] of a model with learned positions."""
    length: int = 0
    runs: list[tuple[str, RunResult]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for program in self.programs.programs.values():
            self.device.write_aux(program.base, program.encoded())

    def forward(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append tokens; logits Q16 int64 [V] of the last one."""
        ids = list(tokens)
        self._check(ids, self.length)
        while ids:
            count = self._pass_size(len(ids))
            self._run_pass(ids[:count])
            ids = ids[count:]
        return self._head(count)

    def _check(self, ids: list[int], start: int) -> None:
        """KVStrataError for tokens that a sequence of `start` tokens cannot take."""
        memory_map = self.programs.map
        if not ids:
            raise KVStrataError("a step needs at least one token; got none")
        for token in ids:
            if not 0 <= token < memory_map.model.vocab:
                raise KVStrataError(f"a token id must be 0 to {memory_map.model.vocab - 1}; got {token}")
        if start + len(ids) > memory_map.context:
            raise KVStrataError(
                f"the memory map holds a context of {memory_map.context} tokens; got {start + len(ids)}"
            )

    def _pass_size(self, left: int) -> int:
        chunk = self.programs.chunk
        return chunk if chunk > 1 and left >= chunk and self.length % chunk == 0 else 1

    def _run_pass(self, ids: list[int]) -> None:
        self._write_rows("input", self._embed(ids, self.length))
        self._layers(len(ids))
        self.length += len(ids)

    def _layers(self, tokens: int) -> None:
        name = "decode" if tokens == 1 else "prefill"
        ring = self.programs.map.ring
        if "sinks" in self.programs.programs and ring is not None and self.length < ring.sinks:
            name = "sinks"
        self._run(name, self.length, tokens)

    def _write_rows(self, region: str, rows: torch.Tensor) -> None:
        place = self.programs.map.regions[region]
        for index, row in enumerate(rows):
            self._write_row(place.at(index), row)

    def _write_row(self, address: int, row: torch.Tensor) -> None:
        self.device.write_aux(address, row.numpy().astype("<i4").view(np.uint8))

    def _run(self, name: str, start: int, tokens: int) -> None:
        """A program with the registers of `tokens` tokens from slot `start` on."""
        registers = {int(r): v for r, v in step_registers(self.programs.map, start, tokens).items()}
        self.runs.append((name, self.device.run(self.programs.programs[name].word, registers)))

    def _embed(self, ids: list[int], start: int) -> torch.Tensor:
        """Q16 rows [T, hidden] of tokens from slot `start` on (docs/formats.md section 10)."""
        at = torch.arange(start, start + len(ids))
        return embedding_rows(self.embedding, torch.tensor(ids), self.positions, at)

    def _head(self, tokens: int) -> torch.Tensor:
        self._run("head", self.length - tokens, tokens)
        logits = self.programs.map.regions["logits"]
        raw = self.device.read_aux(logits.base, 4 * self.programs.map.model.vocab)
        return torch.from_numpy(raw.view("<i4").astype(np.int64))

    def hidden(self, tokens: int) -> torch.Tensor:
        """Residual stream int64 [tokens, hidden] that the last pass left."""
        model, words = self.programs.map.model, self.programs.map.row_words(self.programs.map.model.hidden)
        rows = [self.device.read_vb(t * words, model.hidden) for t in range(tokens)]
        return torch.from_numpy(np.stack(rows)).long()

    def _rows(self, region: str, count: int, width: int) -> torch.Tensor:
        """Q16 int64 [count, width] of an auxiliary region."""
        place = self.programs.map.regions[region]
        rows = [self.device.read_aux(place.at(t), 4 * width).view("<i4") for t in range(count)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    @property
    def cycles(self) -> int:
        """Cycles of all runs."""
        return sum(result.cycles for _, result in self.runs)


@dataclass
class SplitSession(Session):
    """A sequence whose attention happens elsewhere: `programs` from `compile_split`, one token per pass."""

    cut: ClassVar[str] = "split"
    placement: Placement | None = None

    def _layers(self, tokens: int) -> None:
        model = self.programs.map.model
        for layer in range(model.layers):
            self._run(f"{self.cut}{layer}", self.length, tokens)
            self._write_rows("mixed", self._attention(layer, *self._queries(tokens)))
        self._run(f"{self.cut}{model.layers}", self.length, tokens)

    def _queries(self, tokens: int) -> tuple[torch.Tensor, ...]:
        """q, k and v [tokens, heads, dh] that the layer's first half left."""
        model = self.programs.map.model
        heads = (model.heads, model.kv_heads, model.kv_heads)
        qkv = self._rows("qkv", tokens, sum(heads) * model.head_size)
        return qkv.view(tokens, -1, model.head_size).split(heads, 1)

    def _attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert self.placement is not None
        return self.placement.attend(layer, self.length, q, k, v)


@dataclass
class SharedSession(SplitSession):
    """A sequence whose attention the engine shares with a drive: `programs` from `compile_shares`."""

    cut = "share"
    older: WindowAndStorage | None = None

    def _attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert self.older is not None
        model, lanes = self.programs.map.model, self.programs.map.engine.vector_lanes
        states = self._rows("states", model.heads, lanes)
        y = self._rows("mixed", 1, model.heads * model.head_size).view(model.heads, -1)
        total = (states[:, 2] << 32) + (states[:, 1] & 0xFFFFFFFF)
        return self.older.attend(layer, self.length, q[0], k[0], v[0], EngineShare(states[:, 0], total, y))
