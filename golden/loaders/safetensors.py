"""Llama checkpoints as a folder of config.json and *.safetensors (Hugging Face names)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golden.config import LlamaConfig
from golden.formats.weights import QuantisedWeight
from golden.loaders.checkpoint import Checkpoint, file_sha256
from golden.loaders.tokenizer import tokenizer_from_folder
from golden.spec import KVStrataError

_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
}  # fmt: skip
_TOP_NAMES = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"}


def load_safetensors(folder: str | Path) -> Checkpoint:
    """A checkpoint from a folder; q and k rows are permuted from half-split to interleaved RoPE pairs.

    Raises KVStrataError for a missing or truncated file, an architecture other than Llama, RoPE scaling.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise KVStrataError(f"a checkpoint folder must hold *.safetensors, found none in {folder}.")
    raw_config = _read_config(folder)
    config = config_from_json(raw_config, str(folder))
    tensors: dict[str, Tensor | QuantisedWeight] = {}
    for file in files:
        tensors |= _read_tensors(file, config)
    if raw_config.get("tie_word_embeddings"):
        tensors.pop("head", None)
    digest = hashlib.sha256("".join(file_sha256(f) for f in files).encode()).hexdigest()
    return Checkpoint(config, tensors, tokenizer_from_folder(folder), folder.name, digest).check()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise KVStrataError(f"a checkpoint folder must hold config.json, missing in {folder}.")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise KVStrataError(f"config.json must be JSON, {path} is not ({error}).") from error


def config_from_json(raw: dict[str, Any], source: str) -> LlamaConfig:
    """The shape in a Hugging Face config.json (weights not needed); KVStrataError for what is not Llama."""
    if raw.get("model_type") != "llama":
        raise KVStrataError(
            f"config.json must say model_type llama, got {raw.get('model_type')} in {source}."
        )
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise KVStrataError(f"RoPE scaling must be none, got {kind} in {source}.")
    missing = [k for k in ("num_hidden_layers", "hidden_size", "num_attention_heads") if k not in raw]
    missing += [k for k in ("intermediate_size", "vocab_size", "rms_norm_eps") if k not in raw]
    if missing:
        raise KVStrataError(f"config.json must give {missing[0]}, missing in {source}.")
    heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    return LlamaConfig(
        name=str(raw.get("_name_or_path") or source), layers=int(raw["num_hidden_layers"]), hidden=hidden, heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_size=int(raw.get("head_dim") or hidden // heads), ffn=int(raw["intermediate_size"]),
        vocab=int(raw["vocab_size"]), context=int(raw.get("max_position_embeddings", 2048)),
        rope_base=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        norm_eps=float(raw["rms_norm_eps"]),
    )  # fmt: skip


def _read_tensors(path: Path, config: LlamaConfig) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(str(path), "pt") as file:
            for key in file.keys():  # noqa: SIM118
                name = _canonical(key)
                if name is not None:
                    found[name] = interleave(file.get_tensor(key).float(), name, config)
    except SafetensorError as error:
        raise KVStrataError(f"a safetensors file must be complete, {path} is damaged ({error}).") from error
    return found


def _canonical(key: str) -> str | None:
    if not key.endswith(".weight"):
        if key.endswith("rotary_emb.inv_freq"):
            return None
        raise KVStrataError(f"a Llama checkpoint must hold weights alone, got the tensor {key}.")
    stem = key.removesuffix(".weight")
    if stem in _TOP_NAMES:
        return _TOP_NAMES[stem]
    parts = stem.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[3] in _LAYER_NAMES:
        return f"layers.{parts[2]}.{_LAYER_NAMES[parts[3]]}"
    raise KVStrataError(f"a Llama checkpoint must hold Llama tensors alone, got {key}.")


def interleave(weight: Tensor, name: str, config: LlamaConfig) -> Tensor:
    """Rows of q and k from half-split pairs (i, i + dh/2) to interleaved pairs (2i, 2i + 1)."""
    if name.rpartition(".")[2] not in {"q", "k"} or weight.shape[0] % config.head_size:
        return weight
    halves = weight.unflatten(0, (-1, 2, config.head_size // 2))
    return torch.stack((halves[:, 0], halves[:, 1]), 2).flatten(0, 2)
