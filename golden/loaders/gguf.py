"""GGUF files of the Llama architecture: Q4_1 and Q8_0 tensors are kept as codes, others become float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golden.config import DecoderConfig
from golden.formats.weights import QuantisedWeight, import_gguf_block
from golden.loaders.checkpoint import Checkpoint, file_sha256
from golden.loaders.tokenizer import tokenizer_from_gguf
from golden.spec import KVStrataError
from golden.spec.formats import W4, W8

_LAYER_NAMES = {
    "attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "attn_q": "q", "attn_k": "k", "attn_v": "v",
    "attn_output": "o", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip
_TOP_NAMES = {"token_embd": "embed", "output_norm": "norm", "output": "head"}
_IMPORTED = {"Q4_1", "Q8_0"}


def load_gguf(path: str | Path) -> Checkpoint:
    """A checkpoint from a GGUF file.

    llama.cpp's converter stores q and k rows for interleaved RoPE pairs, the pairing of this project, so rows
    stay as they are. Raises KVStrataError for a file that is missing, truncated, not GGUF or not Llama.
    """
    path = Path(path)
    if not path.is_file():
        raise KVStrataError(f"a GGUF model must be an existing file, got {path}.")
    reader = _open(path)
    metadata = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    tensors: dict[str, Tensor | QuantisedWeight] = {}
    for tensor in reader.tensors:
        name = _canonical(tensor.name)
        if name is None:
            raise KVStrataError(f"a Llama GGUF must hold Llama tensors alone, got {tensor.name} in {path}.")
        tensors[name] = _convert(tensor)
    config = _config(metadata, path, tensors)
    tokenizer = tokenizer_from_gguf(metadata, str(path)) if "tokenizer.ggml.model" in metadata else None
    return Checkpoint(config, tensors, tokenizer, path.name, file_sha256(path)).check()


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    if path.stat().st_size < 4 or path.open("rb").read(4) != b"GGUF":
        raise KVStrataError(f"a GGUF file must start with the bytes GGUF, {path} does not.")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise KVStrataError(
            f"a GGUF file must be complete, {path} is truncated or damaged ({error})."
        ) from error


def _canonical(name: str) -> str | None:
    stem, _, suffix = name.rpartition(".")
    if suffix != "weight":
        return None
    if stem in _TOP_NAMES:
        return _TOP_NAMES[stem]
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in _LAYER_NAMES:
        return f"layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}"
    return None


def _convert(tensor: Any) -> Tensor | QuantisedWeight:
    from gguf.quants import dequantize

    kind = tensor.tensor_type.name
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if kind in _IMPORTED and len(shape) == 2:
        try:
            return import_gguf_block(tensor.data, kind, W4, W8)
        except KVStrataError as error:
            raise KVStrataError(f"the tensor {tensor.name} is not legal: {error}") from error
    try:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    except NotImplementedError as error:
        raise KVStrataError(
            f"a GGUF tensor type must be one that gguf dequantises, got {kind} in {tensor.name}."
        ) from error
    return torch.from_numpy(values.copy()).reshape(shape)


def _config(metadata: dict[str, Any], path: Path, tensors: dict[str, Any]) -> DecoderConfig:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise KVStrataError(f"a GGUF model must be of architecture llama, got {architecture} in {path}.")
    if "rope_freqs" in tensors or metadata.get("llama.rope.scaling.type", "none") != "none":
        raise KVStrataError(
            f"RoPE scaling must be none, got {metadata.get('llama.rope.scaling.type')} in {path}."
        )

    def need(key: str) -> Any:
        if f"llama.{key}" not in metadata:
            raise KVStrataError(f"a Llama GGUF must give llama.{key}, missing in {path}.")
        return metadata[f"llama.{key}"]

    heads, hidden = int(need("attention.head_count")), int(need("embedding_length"))
    if "embed" not in tensors:
        raise KVStrataError(f"a Llama checkpoint must hold the tensor embed, missing in {path}.")
    return DecoderConfig(
        name=str(metadata.get("general.name", path.stem)),
        layers=int(need("block_count")), hidden=hidden, heads=heads,
        kv_heads=int(metadata.get("llama.attention.head_count_kv", heads)),
        head_size=int(metadata.get("llama.attention.key_length", hidden // heads)),
        ffn=int(need("feed_forward_length")), vocab=int(tensors["embed"].shape[0]),
        context=int(need("context_length")),
        rope_base=float(metadata.get("llama.rope.freq_base", 10000.0)),
        norm_eps=float(need("attention.layer_norm_rms_epsilon")),
    )  # fmt: skip
