"""Shape of a Llama decoder, from GGUF metadata, a config.json or by hand."""

from __future__ import annotations

from dataclasses import dataclass

from golden.spec import KVStrataError


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama-shaped decoder: counts, widths in elements, RoPE base, RMSNorm epsilon."""

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

    def __post_init__(self) -> None:
        """Refuse sizes that contradict."""
        for field in ("layers", "hidden", "heads", "kv_heads", "head_size", "ffn", "vocab", "context"):
            if getattr(self, field) < 1:
                raise KVStrataError(f"a model's {field} must be at least 1, got {getattr(self, field)}.")
        if self.heads % self.kv_heads:
            raise KVStrataError(
                f"the query heads must be a multiple of the KV heads, got {self.heads} and {self.kv_heads}."
            )
        if self.head_size % 2:
            raise KVStrataError(f"the head size must be even for RoPE, got {self.head_size}.")

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each matrix product of one layer."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q": (q, self.hidden), "k": (kv, self.hidden), "v": (kv, self.hidden), "o": (self.hidden, q),
            "gate": (self.ffn, self.hidden), "up": (self.ffn, self.hidden), "down": (self.hidden, self.ffn),
        }  # fmt: skip
