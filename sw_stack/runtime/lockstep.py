"""Two decoders step by step, stopping at the first tensor that differs.

The golden decoder runs beside a device and never takes a value from it: both get the same token ids. After each pass
the residual stream and the logits are compared; at a difference the pass is repeated on both, layer by layer, with
programs that stop after each layer, to name the first differing tensor, its layer and index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from golden.exact_decoder import ExactDecoder
from golden.spec import KVStrataError
from sw_stack.compile.layers import Layers
from sw_stack.compile.program import Program
from sw_stack.runtime.session import Session


@dataclass(frozen=True)
class Difference:
    """The first element that differs."""

    tensor: str
    layer: int
    index: int
    device: int
    golden: int

    def __str__(self) -> str:
        where = f"{self.tensor} of layer {self.layer}" if self.layer >= 0 else self.tensor
        return f"{where} differs first at index {self.index}: device {self.device}, golden {self.golden}"


def first_difference(
    tensor: str, layer: int, device: torch.Tensor, golden: torch.Tensor
) -> Difference | None:
    """The lowest flat index at which two tensors of one size differ."""
    wrong = (device.flatten() != golden.flatten()).nonzero()
    if not len(wrong):
        return None
    i = int(wrong[0])
    return Difference(tensor, layer, i, int(device.flatten()[i]), int(golden.flatten()[i]))


class Lockstep:
    """A session beside the golden decoder of the same model."""

    def __init__(self, session: Session, golden: ExactDecoder, norms: tuple[tuple[int, int], ...]) -> None:
        self.session, self.golden, self._norms = session, golden, norms
        self.cache = golden.new_cache()

    def forward(self, tokens: Sequence[int]) -> tuple[torch.Tensor, Difference | None]:
        """Golden logits of the last token, and the first difference if there is one."""
        start = self.session.length
        seen = self._observe(tokens)
        logits = self.session.forward(tokens)
        expected = seen["logits"]
        if torch.equal(logits, expected) and self._same_stream(seen):
            return expected, None
        return expected, self._locate(tokens, start, seen) or first_difference("logits", -1, logits, expected)

    def require(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits of the last token, equal on both sides; KVStrataError naming the first difference."""
        logits, difference = self.forward(tokens)
        if difference is not None:
            raise KVStrataError(f"the device must compute the golden decoder's tensors; {difference}")
        return logits

    def _same_stream(self, seen: dict[str, torch.Tensor]) -> bool:
        """Whether the last pass left the golden residual stream: small errors may not reach the logits."""
        name = next(n for n, _ in reversed(self.session.runs) if n != "head")
        rows = self.session.programs.programs[name].tokens
        last = seen[f"{self.session.programs.map.model.layers - 1}"]
        return torch.equal(self.session.hidden(rows), last[-rows:])

    def _observe(self, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
        """Golden forward pass; residual streams by layer and logits."""
        seen: dict[str, torch.Tensor] = {}

        def probe(layer: int, operator: str, operands: dict[str, Any]) -> None:
            if operator == "residual.ffn":
                seen[f"{layer}"] = operands["sum"]

        self.golden.probe = probe
        seen["logits"] = self.golden.forward(list(tokens), self.cache, last_only=True)[0]
        self.golden.probe = None
        return seen

    def _locate(self, tokens: Sequence[int], start: int, seen: dict[str, torch.Tensor]) -> Difference | None:
        """Run the tokens again, one at a time, through programs cut after 1, 2, ... layers."""
        session = self.session
        memory_map = session.programs.map
        full = session.programs.programs["decode"]
        for layer in range(memory_map.model.layers):
            cut = Layers(memory_map, self._norms, 1).build(range(layer + 1))
            program = Program("decode", 1, full.base, tuple(cut))
            session.device.write_aux(program.base, program.encoded())
            for i, token in enumerate(tokens):
                session.length = start + i
                session._run_pass([token])
                found = first_difference("residual stream", layer, session.hidden(1)[0], seen[f"{layer}"][i])
                if found:
                    session.device.write_aux(full.base, full.encoded())
                    return found
        session.device.write_aux(full.base, full.encoded())
        return None
