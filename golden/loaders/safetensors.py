"""Llama and OPT checkpoints as a folder of config.json and *.safetensors (Hugging Face names)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golden.config import DecoderConfig
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
_OPT_LAYER_NAMES = {
    "self_attn_layer_norm": "attn_norm", "final_layer_norm": "ffn_norm",
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.out_proj": "o",
    "fc1": "up", "fc2": "down",
}  # fmt: skip
_OPT_TOP_NAMES = {
    "embed_tokens": "embed", "embed_positions": "positions", "final_layer_norm": "norm", "lm_head": "head",
}  # fmt: skip
OPT_POSITION_OFFSET = 2
"""OPT's table of positions begins with two rows that no token uses."""


def load_safetensors(folder: str | Path) -> Checkpoint:
    """A checkpoint from a folder; q and k rows are permuted from half-split to interleaved RoPE pairs.

    Raises KVStrataError for a missing or truncated file, an architecture other than Llama and OPT, RoPE scaling.
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
    if raw_config.get("tie_word_embeddings", not config.rotates):
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


def config_from_json(raw: dict[str, Any], source: str) -> DecoderConfig:
    """The shape in a Hugging Face config.json (weights not needed); KVStrataError for what is not Llama or OPT."""
    if raw.get("model_type") == "opt":
        return _opt_config(raw, source)
    if raw.get("model_type") != "llama":
        raise KVStrataError(
            f"config.json must say model_type llama or opt, got {raw.get('model_type')} in {source}."
        )
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise KVStrataError(f"RoPE scaling must be none, got {kind} in {source}.")
    _require(raw, ("intermediate_size", "rms_norm_eps"), source)
    heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    return DecoderConfig(
        name=str(raw.get("_name_or_path") or source), layers=int(raw["num_hidden_layers"]), hidden=hidden, heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_size=int(raw.get("head_dim") or hidden // heads), ffn=int(raw["intermediate_size"]),
        vocab=int(raw["vocab_size"]), context=int(raw.get("max_position_embeddings", 2048)),
        rope_base=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        norm_eps=float(raw["rms_norm_eps"]),
    )  # fmt: skip


def _require(raw: dict[str, Any], names: tuple[str, ...], source: str) -> None:
    common = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    missing = [name for name in (*common, *names) if name not in raw]
    if missing:
        raise KVStrataError(f"config.json must give {missing[0]}, missing in {source}.")


def _opt_config(raw: dict[str, Any], source: str) -> DecoderConfig:
    """OPT with norms before attention and network, as all published sizes but 350M have it."""
    _require(raw, ("ffn_dim",), source)
    heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    for name, wanted, default in (
        ("do_layer_norm_before", True, True), ("activation_function", "relu", "relu"),
        ("word_embed_proj_dim", hidden, hidden), ("layer_norm_elementwise_affine", True, True),
        ("_remove_final_layer_norm", False, False),
    ):  # fmt: skip
        if raw.get(name, default) != wanted:
            raise KVStrataError(f"an OPT model must have {name} {wanted}, got {raw[name]} in {source}.")
    return DecoderConfig(
        name=str(raw.get("_name_or_path") or source), layers=int(raw["num_hidden_layers"]), hidden=hidden, heads=heads,
        kv_heads=heads, head_size=hidden // heads, ffn=int(raw["ffn_dim"]), vocab=int(raw["vocab_size"]),
        context=int(raw.get("max_position_embeddings", 2048)), rope_base=0.0, norm_eps=1e-5,
        norm="layer", positions="learned", activation="relu", biases=True,
    )  # fmt: skip


def _read_tensors(path: Path, config: DecoderConfig) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(str(path), "pt") as file:
            for key in file.keys():  # noqa: SIM118
                name = _canonical(key) if config.rotates else _opt_canonical(key)
                if name is not None:
                    found[name] = interleave(file.get_tensor(key).float(), name, config)
                if name == "positions":
                    found[name] = found[name][OPT_POSITION_OFFSET:]
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


def _opt_canonical(key: str) -> str:
    stem, _, kind = key.removeprefix("model.").removeprefix("decoder.").rpartition(".")
    suffix = {"weight": "", "bias": "_bias"}.get(kind)
    parts = stem.split(".", 2)
    known = _OPT_TOP_NAMES.get(stem)
    if len(parts) == 3 and parts[0] == "layers" and parts[2] in _OPT_LAYER_NAMES:
        known = f"layers.{parts[1]}.{_OPT_LAYER_NAMES[parts[2]]}"
    if known is None or suffix is None:
        raise KVStrataError(f"an OPT checkpoint must hold OPT tensors alone, got {key}.")
    return known + suffix


def interleave(weight: Tensor, name: str, config: DecoderConfig) -> Tensor:
    """Rows of q and k from half-split pairs (i, i + dh/2) to interleaved pairs (2i, 2i + 1)."""
    if not config.rotates or name.rpartition(".")[2] not in {"q", "k"} or weight.shape[0] % config.head_size:
        return weight
    halves = weight.unflatten(0, (-1, 2, config.head_size // 2))
    return torch.stack((halves[:, 0], halves[:, 1]), 2).flatten(0, 2)
