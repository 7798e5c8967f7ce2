"""A loaded checkpoint: shape, tensors by canonical name, tokenizer, and the hash of its bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from golden.config import DecoderConfig
from golden.formats.weights import QuantisedWeight
from golden.loaders.tokenizer import ChatTokenizer
from golden.spec import KVStrataError

NORMS = ("attn_norm", "ffn_norm")


@dataclass(frozen=True)
class Checkpoint:
    """Weights under canonical names, q and k rows in the interleaved pairing of docs/formats.md section 6.

    tensors: `embed` [vocab, hidden], `norm` [hidden], optionally `head` (absent when tied to `embed`),
    `layers.{i}.{q,k,v,o,gate,up,down,attn_norm,ffn_norm}` (no `gate` where the network has none), `positions`
    [context, hidden] where they are learned, and with biases `{name}_bias` of products and norms, zero where absent.
    A value is a float32 tensor, or a QuantisedWeight where the file already holds an engine format.
    """

    config: DecoderConfig
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
            raise KVStrataError(f"a checkpoint must hold the tensor {name}, missing in {self.source}.")
        return self.tensors[name]

    def float32(self, name: str) -> Tensor:
        """A tensor as float32, dequantised and rounded once where the file holds codes."""
        if name.endswith("_bias") and name not in self.tensors:
            return torch.zeros(self._shapes()[name])
        value = self.tensor(name)
        return value.dequantise().float() if isinstance(value, QuantisedWeight) else value

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the shape asks for, with its biases."""
        c = self.config
        shapes: dict[str, tuple[int, ...]] = {"embed": (c.vocab, c.hidden), "norm": (c.hidden,)}
        if not c.rotates:
            shapes["positions"] = (c.context, c.hidden)
        for i in range(c.layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in c.linear_shapes().items()}
            shapes |= {f"layers.{i}.{name}": (c.hidden,) for name in NORMS}
        if c.biases:
            own = [n for n in shapes if n not in ("embed", "positions")]
            shapes |= {f"{name}_bias": (shapes[name][0],) for name in own}
        return shapes

    def check(self) -> Checkpoint:
        """Itself, if every tensor is there with its shape; KVStrataError names the first that is not."""
        c = self.config
        expected = self._shapes()
        for name in [n for n in expected if n.endswith("_bias") and n not in self.tensors]:
            del expected[name]
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
