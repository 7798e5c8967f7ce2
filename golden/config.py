"""Shape of a decoder, from GGUF metadata, a config.json or by hand."""

from __future__ import annotations

from dataclasses import dataclass

from golden.spec import KVStrataError

NORMS = ("rms", "layer")
POSITIONS = ("rope", "learned")
ACTIVATIONS = ("silu", "relu")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder (counts, widths in elements, RoPE base, epsilon of the norms) and which operators it has.

    The defaults are Llama's. OPT has `norm` layer, `positions` learned (`rope_base` then means nothing), `activation`
    relu (a feed-forward network of up and down without a gate), `biases`; its engine form (golden.engine_form) has
    `norm` rms.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    context: int
    rope_base: float
    norm_eps: float
    norm: str = "rms"
    positions: str = "rope"
    activation: str = "silu"
    biases: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that contradict."""
        for field in ("layers", "hidden", "heads", "kv_heads", "head_size", "ffn", "vocab", "context"):
            if getattr(self, field) < 1:
                raise KVStrataError(f"a model's {field} must be at least 1, got {getattr(self, field)}.")
        if self.heads % self.kv_heads:
            raise KVStrataError(
                f"the query heads must be a multiple of the KV heads, got {self.heads} and {self.kv_heads}."
            )
        for field, known in (("norm", NORMS), ("positions", POSITIONS), ("activation", ACTIVATIONS)):
            if getattr(self, field) not in known:
                raise KVStrataError(
                    f"a model's {field} must be one of {', '.join(known)}, got {getattr(self, field)}."
                )
        if self.rotates and self.head_size % 2:
            raise KVStrataError(f"the head size must be even for RoPE, got {self.head_size}.")

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def rotates(self) -> bool:
        """Whether queries and keys are rotated by their position."""
        return self.positions == "rope"

    @property
    def gated(self) -> bool:
        """Whether the feed-forward network multiplies `up` by an activated `gate`."""
        return self.activation == "silu"

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each matrix product of one layer."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes = {
            "q": (q, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, q),
        }
        if self.gated:
            shapes["gate"] = (self.ffn, self.hidden)
        return shapes | {"up": (self.ffn, self.hidden), "down": (self.hidden, self.ffn)}
