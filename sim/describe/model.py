"""Decoder shapes: presets, or any Hugging Face `config.json` of an OPT-, Llama-, Qwen2- or Mixtral-like model.

Letters: L layers, h hidden size, H query heads, Hkv KV heads, dh head size, F FFN width, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import model_validator

from sim.describe.base import ConfigError, Count, Described, assumed, build, load

FP16_BYTES = 2


class Model(Described):
    """Shape of a decoder; everything the system model needs to know about a checkpoint."""

    kind: ClassVar[str] = "model"
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_size: Count
    ffn: Count
    vocabulary: Count
    max_positions: Count
    gated: bool
    tied_embeddings: bool
    biases: bool = assumed(False, "checkpoint's config.json")
    experts: Count = assumed(1, "checkpoint's config.json")
    experts_per_token: Count = assumed(1, "checkpoint's config.json")
    prefix_positions: int = assumed(0, "checkpoint's config.json", ge=0)

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads = {self.kv_heads}, got {self.heads}")
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token must be at most experts = {self.experts}, got {self.experts_per_token}"
            )
        return self

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def attention_weights(self) -> int:
        """Weights of q, k, v and o projections of one layer."""
        return self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)

    @property
    def ffn_weights(self) -> int:
        """Weights of one expert's FFN of one layer."""
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def layer_weights(self) -> int:
        """Weights stored per layer, all experts, biases and norms left out (below 0.1%)."""
        router = self.hidden * self.experts if self.experts > 1 else 0
        return self.attention_weights + self.experts * self.ffn_weights + router

    def active_ffn_weights(self, tokens: int) -> float:
        """FFN weights of a layer touched by `tokens` tokens routed uniformly at random."""
        if self.experts == 1:
            return float(self.ffn_weights)
        missed = (1 - self.experts_per_token / self.experts) ** tokens
        return self.experts * (1 - missed) * self.ffn_weights

    @property
    def head_weights(self) -> int:
        """Weights of the LM head."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All weights held: layers, LM head, embedding (once where tied) and learned positions."""
        embeddings = self.head_weights * (1 if self.tied_embeddings else 2)
        return self.layers * self.layer_weights + embeddings + self.prefix_positions * self.hidden

    @property
    def weight_bytes(self) -> int:
        """fp16 checkpoint size."""
        return FP16_BYTES * self.parameters

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """fp16 K and V of one token in one layer."""
        return 2 * FP16_BYTES * self.kv_heads * self.head_size

    @property
    def kv_bytes_per_token(self) -> int:
        """fp16 K and V of one token in all layers."""
        return self.layers * self.kv_bytes_per_token_layer


def load_model(ref: str | Path) -> Model:
    """A preset by name, a TOML description or a Hugging Face config.json by path."""
    path = Path(ref)
    return _from_config(path) if path.suffix == ".json" else load(Model, ref)


def _from_config(path: Path) -> Model:
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"model config {path} does not exist") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"model config {path} is not valid JSON: {error}") from None
    family = config.get("model_type", "")
    known = ("opt", "llama", "qwen2", "mistral", "mixtral")
    if family not in known:
        raise ConfigError(
            f"model config {path}: model_type must be one of {', '.join(known)}, got {family!r}"
        )
    missing = [
        k
        for k in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
        if k not in config
    ]
    if missing:
        raise ConfigError(f"model config {path}: field {missing[0]} is required and missing")
    return build(Model, _fields(config, family, path), f"model config {path}")


def _fields(config: dict[str, Any], family: str, path: Path) -> dict[str, Any]:
    opt, heads, hidden = family == "opt", config["num_attention_heads"], config["hidden_size"]
    positions = config.get("max_position_embeddings", 2048)
    return {
        "name": path.parent.name or path.stem,
        "layers": config["num_hidden_layers"],
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads", heads),
        "head_size": config.get("head_dim") or hidden // heads,
        "ffn": config["ffn_dim"] if opt else config["intermediate_size"],
        "vocabulary": config["vocab_size"],
        "max_positions": positions,
        "gated": not opt,
        "tied_embeddings": config.get("tie_word_embeddings", opt),
        "biases": opt or family == "qwen2",
        "experts": config.get("num_local_experts", 1),
        "experts_per_token": config.get("num_experts_per_tok", 1),
        "prefix_positions": positions + 2 if opt else 0,
    }
