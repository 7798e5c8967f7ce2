"""Writing and opening a directory of memory images.

`channelNN.bin` is one weight channel, `aux.bin` auxiliary memory, `manifest.json` the map and a SHA-256 per file
and tensor. Tensors are packed one at a time into files of final size, so memory stays at one tensor whatever the
model; KV regions are left as holes. The directory is written under a temporary name and renamed when whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from golden import ops
from golden.engine_form import engine_form
from golden.exact_decoder import engine_biases, engine_weight
from golden.formats.packing import sparse24_fields
from golden.formats.weights import QuantisedWeight, fitting_group
from golden.loaders.checkpoint import Checkpoint
from golden.spec import KVStrataError
from golden.spec.engine import W8_OFFSET, WORD_BYTES
from golden.spec.formats import W8, WEIGHT_FORMATS
from sw_stack.pack.memory_map import Matrix, MemoryMap
from sw_stack.pack.stream import Fields, pack_matrix

MANIFEST = "manifest.json"
AUX = "aux.bin"

Weights = Callable[[str], QuantisedWeight]
"""A tensor by canonical name in its engine format; called once per tensor."""


def channel_file(channel: int) -> str:
    """Name of a channel's image."""
    return f"channel{channel:02d}.bin"


def checkpoint_weights(checkpoint: Checkpoint, memory_map: MemoryMap) -> Weights:
    """Tensors of a checkpoint in the map's formats."""

    def get(name: str) -> QuantisedWeight:
        if name == "head":
            stored = checkpoint.head_name
            return engine_weight(checkpoint, stored, fitting_group(W8, memory_map.model.hidden))
        return engine_weight(checkpoint, name, WEIGHT_FORMATS[memory_map.weights])

    return get


def stored_fields(weight: QuantisedWeight) -> Fields:
    """Unsigned fields of a weight as the image stores them."""
    scale = _half_bits(weight.scale)
    minimum = None if weight.minimum is None else _half_bits(weight.minimum)
    codes = weight.codes.numpy()
    if not weight.format.sparse24:
        offset = 0 if weight.format.asymmetric else W8_OFFSET
        return Fields((codes.astype(np.int16) + offset).astype(np.uint8), scale, minimum)
    assert weight.kept is not None
    quads = sparse24_fields(codes, weight.kept.numpy())
    kept = np.stack([quads >> 3 & 3, quads >> 5 & 3], -1).reshape(len(codes), -1)
    return Fields(kept, scale, minimum, quads & 7)


def _half_bits(values: torch.Tensor) -> np.ndarray:
    return values.numpy().astype("<f2").view(np.uint16)


def pack_model(
    directory: str | Path,
    memory_map: MemoryMap,
    weights: Weights,
    norms: Callable[[str], torch.Tensor],
    source: str,
    progress: Callable[[str], None] = lambda _: None,
    biases: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Image:
    """Write the images of a model to `directory` (replaced if it exists) and open them.

    `norms` gives RMSNorm weights float [hidden] by name, `biases` Q16 biases as `engine_biases` names them (all zero
    where absent); `source` is the checkpoint's hash. KVStrataError when a tensor has another shape than the map says.
    """
    target = Path(directory)
    work = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise KVStrataError(
            f"images go to a directory that can be made; {target} cannot: {error.strerror}"
        ) from error
    try:
        size = memory_map.channel_words * WORD_BYTES
        files = [_create(work / channel_file(c), size) for c in range(memory_map.engine.channels)]
        hashes = {}
        for matrix in memory_map.matrices.values():
            progress(matrix.name)
            words = pack_matrix(memory_map.engine, matrix.stream, _matrix_fields(matrix, weights))
            for file, part in zip(files, words, strict=True):
                start = matrix.base * WORD_BYTES
                file[start : start + part.size] = part.reshape(-1)
            hashes[matrix.name] = hashlib.sha256(words.data).hexdigest()
        for file in files:
            file.flush()
        prepared = [ops.prepare_norm(norms(n), memory_map.model.norm_eps) for n in norm_names(memory_map)]
        aux = _aux_image(memory_map, prepared, biases)
        (work / AUX).write_bytes(aux.tobytes())
        manifest = {
            **memory_map.to_json(),
            "source_sha256": source,
            "norm_exponents": [[norm.exponent, norm.eps] for norm in prepared],
            "tensors": hashes,
            "files": {p.name: _weights_sha256(p, memory_map) for p in sorted(work.glob("*.bin"))},
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        del files
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Image.open(target)


def pack_checkpoint(
    directory: str | Path,
    memory_map: MemoryMap,
    checkpoint: Checkpoint,
    progress: Callable[[str], None] = lambda _: None,
) -> Image:
    """`pack_model` of a loaded checkpoint's engine form."""
    checkpoint = engine_form(checkpoint)
    weights, biases = checkpoint_weights(checkpoint, memory_map), engine_biases(checkpoint)
    return pack_model(directory, memory_map, weights, checkpoint.float32, checkpoint.sha256, progress, biases)


def _create(path: Path, size: int) -> np.memmap:
    with path.open("wb") as file:
        file.truncate(size)
    return np.memmap(path, np.uint8, "r+", shape=(size,))


def _matrix_fields(matrix: Matrix, weights: Weights) -> Fields:
    weight = weights(matrix.name)
    if tuple(weight.shape) != (matrix.rows, matrix.inner) or weight.format != matrix.format:
        raise KVStrataError(
            f"{matrix.name} must be {matrix.rows} x {matrix.inner} in {matrix.format.name} groups of "
            f"{matrix.format.group}; got {weight.shape[0]} x {weight.shape[1]} in {weight.format.name} groups of "
            f"{weight.format.group}"
        )
    return stored_fields(weight)


def _aux_image(
    memory_map: MemoryMap, norms: list[ops.NormWeight], biases: Mapping[str, torch.Tensor]
) -> np.ndarray:
    """uint8 [aux_bytes]: norm weights, biases and RoPE rows; everything else zero."""
    aux = np.zeros(memory_map.aux_bytes, np.uint8)
    for index, norm in enumerate(norms):
        _put(aux, memory_map.regions["norms"].at(index), norm.weight.numpy())
    for name, bias in biases.items():
        layer = int(name.split(".")[1]) if "." in name else 0
        _put(aux, memory_map.regions[f"{name.rpartition('.')[2]}_bias"].at(layer), bias.numpy())
    model = memory_map.model
    if not model.rotates:
        return aux
    rope = memory_map.regions["rope"]
    cos, sin = ops.rope_table(torch.arange(memory_map.rope_rows), model.head_size, model.rope_base)
    rows = torch.stack((cos, sin), -1).flatten(1).numpy().astype("<i4")
    table = aux[rope.base : rope.end].reshape(rope.count, rope.stride)
    table[:, : 4 * model.head_size] = rows.view(np.uint8)
    return aux


def norm_names(memory_map: MemoryMap) -> list[str]:
    """RMSNorm weights in the order of the `norms` region."""
    layers = range(memory_map.model.layers)
    return [f"layers.{i}.{n}_norm" for i in layers for n in ("attn", "ffn")] + ["norm"]


def _put(memory: np.ndarray, address: int, values: np.ndarray) -> None:
    raw = values.astype("<i4").view(np.uint8)
    memory[address : address + len(raw)] = raw


def _weights_sha256(path: Path, memory_map: MemoryMap) -> str:
    """Hash of the constant part of a file: weights of a channel, all of the auxiliary image as packed."""
    left = memory_map.aux_bytes if path.name == AUX else memory_map.weight_words * WORD_BYTES
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while left and (chunk := file.read(min(left, 1 << 22))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Image:
    """An opened directory of images."""

    directory: Path
    map: MemoryMap
    source_sha256: str
    norm_exponents: tuple[tuple[int, int], ...]
    """(f, En) of every RMSNorm weight, in the order of `norm_names`."""

    @classmethod
    def open(cls, directory: str | Path, verify: bool = True) -> Image:
        """Open and check an image directory.

        KVStrataError for a missing manifest, another spec version, a truncated file, or (with `verify`) a file whose
        hash differs from the manifest's.
        """
        base = Path(directory)
        path = base / MANIFEST
        try:
            stored = json.loads(path.read_text())
            files = stored["files"]
        except (OSError, ValueError, KeyError) as error:
            raise KVStrataError(
                f"an image directory holds a whole {MANIFEST}; {base} does not: pack it again"
            ) from error
        memory_map = MemoryMap.from_json(stored)
        expected = {
            channel_file(c): memory_map.channel_words * WORD_BYTES for c in range(memory_map.engine.channels)
        }
        for name, size in (expected | {AUX: memory_map.aux_bytes}).items():
            actual = (base / name).stat().st_size if (base / name).is_file() else 0
            if actual != size:
                raise KVStrataError(
                    f"{name} of an image for this map has {size} bytes; got {actual}: pack it again"
                )
            if verify and _weights_sha256(base / name, memory_map) != files.get(name):
                raise KVStrataError(f"{name} must hash to what {MANIFEST} says; it does not: pack it again")
        exponents = tuple((int(f), int(e)) for f, e in stored["norm_exponents"])
        return cls(base, memory_map, stored["source_sha256"], exponents)

    def require(self, memory_map: MemoryMap) -> None:
        """KVStrataError when the image was packed for another map; the message names the first difference."""
        mine, theirs = self.map.to_json(), memory_map.to_json()
        for name, value in theirs.items():
            if mine[name] != value:
                raise KVStrataError(
                    f"an image for {name} {value} is needed; {self.directory} was packed for {mine[name]}"
                )

    def channel(self, index: int) -> np.ndarray:
        """A private, writable copy-on-write view uint8 [words, 64] of a channel."""
        file = np.memmap(self.directory / channel_file(index), np.uint8, "c")
        return file.reshape(-1, WORD_BYTES)

    def aux(self) -> np.ndarray:
        """A private copy uint8 [aux_bytes] of auxiliary memory."""
        return np.fromfile(self.directory / AUX, np.uint8)
