"""Test-vector files: stimulus and expected output with a header that a reader checks.

A file is a NumPy .npz (no pickle) whose member `header` is JSON: magic, spec version, generator, the make verb
that regenerates it, the hash of what it was made from, and the hash of its arrays. Arrays keep their integer dtype.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from golden.formats.weights import QuantisedWeight
from golden.ops import int24
from golden.spec import SPEC_VERSION, KVStrataError

MAGIC = "kvstrata-vectors"


@dataclass(frozen=True)
class Header:
    """What made a vector file: checked on reading."""

    magic: str
    spec_version: str
    generator: str
    regenerate: str
    source_sha256: str
    content_sha256: str


def _content_hash(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write_vectors(
    path: str | Path,
    arrays: Mapping[str, np.ndarray],
    generator: str,
    regenerate: str,
    source_sha256: str = "",
) -> Path:
    """Write arrays (integer or binary16) under a header; to a temporary name first, then renamed.

    Raises KVStrataError for an array of another kind.
    """
    for name, array in arrays.items():
        if array.dtype.kind not in "iub" and array.dtype != np.float16:
            raise KVStrataError(
                f"a vector array must hold integers or binary16, got {array.dtype} in {name}."
            )
    header = Header(MAGIC, SPEC_VERSION, generator, regenerate, source_sha256, _content_hash(arrays))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    text = np.frombuffer(json.dumps(asdict(header)).encode(), dtype=np.uint8)
    with temporary.open("wb") as file:
        members: dict[str, Any] = {"header": text, **arrays}
        np.savez_compressed(file, **members)
    temporary.replace(path)
    return path


def read_vectors(path: str | Path, regenerate: str = "make vectors") -> tuple[Header, dict[str, np.ndarray]]:
    """Header and arrays of a vector file.

    Raises KVStrataError, naming the make verb that regenerates it, for a file that is missing, damaged, or of
    another spec version.
    """
    path = Path(path)
    if not path.is_file():
        raise KVStrataError(f"a vector file must exist, got {path}: run {regenerate}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != "header"}
            header = Header(**json.loads(file["header"].tobytes()))
    except (KeyError, TypeError, ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise KVStrataError(
            f"a vector file must be complete, {path} is damaged: run {regenerate}."
        ) from error
    if header.magic != MAGIC or header.spec_version != SPEC_VERSION:
        raise KVStrataError(
            f"a vector file must be of spec version {SPEC_VERSION}, {path} has {header.spec_version}: "
            f"run {header.regenerate}."
        )
    if header.content_sha256 != _content_hash(arrays):
        raise KVStrataError(f"a vector file must match its hash, {path} does not: run {header.regenerate}.")
    return header, arrays


def flatten(operands: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Operands of a decoder's probe as named integer arrays.

    Named tuples become `name.field`; a QuantisedWeight becomes codes, int24 scale and int24 minimum; binary16 held in
    float64 becomes its int24 integer; None and plain settings are left out.
    """
    found: dict[str, np.ndarray] = {}
    for name, value in operands.items():
        key = f"{prefix}{name}"
        if isinstance(value, QuantisedWeight):
            parts = {"codes": value.codes, "scale": value.scale, "minimum": value.minimum, "kept": value.kept}
            found |= flatten(parts, f"{key}.")
        elif isinstance(value, tuple) and hasattr(value, "_asdict"):
            found |= flatten(value._asdict(), f"{key}.")
        elif isinstance(value, torch.Tensor):
            found[key] = _integers(value)
        elif isinstance(value, np.ndarray):
            found[key] = value
        elif isinstance(value, int):
            found[key] = np.array(value, dtype=np.int64)
    return found


def _integers(value: torch.Tensor) -> np.ndarray:
    if value.dtype == torch.float64:
        return int24(value).numpy()
    # KV caches hold their small integer codes as float32.
    return (value.long() if value.dtype == torch.float32 else value).numpy()
