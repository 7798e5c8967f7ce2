"""A loaded checkpoint: shape, tensors by canonical name, tokenizer, and the hash of its bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from golden.config import LlamaConfig
from golden.formats.weights import QuantisedWeight
from golden.loaders.tokenizer import ChatTokenizer
from golden.spec import KVStrataError

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("attn_norm", "ffn_norm")


@dataclass(frozen=True)
class Checkpoint:
    """Weights under canonical names, q and k rows in the interleaved pairing of docs/formats.md section 6.

    tensors: `embed` [vocab, hidden], `norm` [hidden], optionally `head` (absent when tied to `embed`), and
    `layers.{i}.{q,k,v,o,gate,up,down,attn_norm,ffn_norm}`. A value is a float32 tensor, or a QuantisedWeight
    where the file already holds an engine format.
    """

    config: LlamaConfig
    tensors: dict[str, Tensor | QuantisedWeight]
    tokenizer: ChatTokenizer | None
    source: str
    sha256: str
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def head_name(self) -> str:
        """Tensor that makes the logits: `embed` when the two are tied."""
        return "head" if "head" in self.tensors else "embed"

    def tensor(self, name: str) -> Tensor | QuantisedWeight:
        """A tensor as stored; KVStrataError if the file lacks it."""
        if name not in self.tensors:
            raise KVStrataError(f"a Llama checkpoint must hold the tensor {name}, missing in {self.source}.")
        return self.tensors[name]

    def float32(self, name: str) -> Tensor:
        """A tensor as float32, dequantised and rounded once where the file holds codes."""
        value = self.tensor(name)
        return value.dequantise().float() if isinstance(value, QuantisedWeight) else value

    def check(self) -> Checkpoint:
        """Itself, if every tensor is there with its shape; KVStrataError names the first that is not."""
        c = self.config
        expected: dict[str, tuple[int, ...]] = {"embed": (c.vocab, c.hidden), "norm": (c.hidden,)}
        for i in range(c.layers):
            expected |= {f"layers.{i}.{name}": shape for name, shape in c.linear_shapes().items()}
            expected |= {f"layers.{i}.{name}": (c.hidden,) for name in NORMS}
        if "head" in self.tensors:
            expected["head"] = (c.vocab, c.hidden)
        for name, shape in expected.items():
            value = self.tensor(name)
            if tuple(value.shape) != shape:
                raise KVStrataError(
                    f"{name} must have shape {shape}, got {tuple(value.shape)} in {self.source}."
                )
            if isinstance(value, Tensor) and not torch.isfinite(value).all():
                raise KVStrataError(f"{name} must be finite, got NaN or infinity in {self.source}.")
        return self


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
