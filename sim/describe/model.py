"""Decoder shapes: presets, or any Hugging Face `config.json` of a decoder.

Letters: L layers, h hidden size, H query heads, Hkv KV heads, dh head size, F FFN width, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import model_validator

from sim.describe.base import ConfigError, Count, Described, assumed, build, load, text_of

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
        config: dict[str, Any] = json.loads(text_of(path, "model config"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"model config {path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"model config {path} must hold a JSON object, got {type(config).__name__}")
    family = config.get("model_type", "")
    if family in OTHER_SHAPES or config.get("is_encoder_decoder") or config.get("kv_lora_rank"):
        raise ConfigError(
            f"model config {path}: model_type must be a decoder whose layers all cache keys and values per head, "
            f"got {family!r}"
        )
    found = {name: _first(config, keys) for name, keys in SPELLINGS.items()}
    if missing := [name for name in REQUIRED if found[name] is None]:
        spelt = " or ".join(SPELLINGS[missing[0]])
        raise ConfigError(f"model config {path}: field {spelt} is required and missing")
    return build(Model, _fields(config, found, path), f"model config {path}")


SPELLINGS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv"),
    "head_size": ("head_dim", "kv_channels"),
    "ffn": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff"),
    "vocabulary": ("vocab_size", "padded_vocab_size"),
    "positions": ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "moe_top_k", "num_experts_per_token"),
    "expert_ffn": ("moe_intermediate_size",),
}
"""Names that published configurations give to the same thing."""
OTHER_SHAPES = (
    "mamba",
    "mamba2",
    "falcon_mamba",
    "rwkv",
    "jamba",
    "bert",
    "roberta",
    "t5",
    "bart",
    "whisper",
)
"""Families without a cache of keys and values per head in every layer: refused, for their numbers would be wrong."""
REQUIRED = ("layers", "hidden", "heads", "vocabulary")
NOT_GATED = ("opt", "gpt2", "gpt_neox", "gptj", "gpt_bigcode", "bloom", "falcon", "phi", "mpt", "starcoder2")
"""Families whose FFN has two matrices; all others in use have a gate."""
LEARNED_POSITIONS = ("opt", "gpt2", "gpt_bigcode")


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[k] for k in keys if config.get(k) is not None), None)


def _fields(config: dict[str, Any], found: dict[str, int | None], path: Path) -> dict[str, Any]:
    family, heads, hidden = config.get("model_type", ""), found["heads"], found["hidden"]
    assert isinstance(heads, int)
    assert isinstance(hidden, int)
    experts, positions = found["experts"] or 1, found["positions"] or 2048
    one_kv_head = config.get("multi_query") and not config.get("new_decoder_architecture")
    ffn = (found["expert_ffn"] if experts > 1 else None) or found["ffn"] or 4 * hidden
    learned = positions + (2 if family == "opt" else 0) if family in LEARNED_POSITIONS else 0
    return {
        "name": path.parent.name or path.stem,
        "layers": found["layers"],
        "hidden": hidden,
        "heads": heads,
        "kv_heads": found["kv_heads"] or (1 if one_kv_head else heads),
        "head_size": found["head_size"] or hidden // heads,
        "ffn": ffn,
        "vocabulary": found["vocabulary"],
        "max_positions": positions,
        "gated": family not in NOT_GATED,
        "tied_embeddings": config.get("tie_word_embeddings", family in LEARNED_POSITIONS),
        "biases": family in (*LEARNED_POSITIONS, "qwen2"),
        "experts": experts,
        "experts_per_token": found["experts_per_token"] or 1,
        "prefix_positions": learned,
    }
