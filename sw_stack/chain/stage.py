"""Stages of the chain: each writes one directory, named by the hash of all that went into it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golden.spec import SPEC_VERSION, KVStrataError
from hw.flow.cache import ROOT, build_dir, cached_directory, content_key


@dataclass(frozen=True)
class StageResult:
    """What a stage produced. `fresh` is false where nothing had changed and the earlier result was taken."""

    name: str
    key: str
    directory: Path
    result: dict[str, Any]
    fresh: bool


def source_key(*packages: str) -> str:
    """Hash of every source file of the packages, given as paths from the repository root."""
    parts: list[str | bytes] = []
    for package in packages:
        base = ROOT / package
        for path in sorted(base.rglob("*") if base.is_dir() else [base]):
            if path.suffix in {".py", ".toml", ".json", ".cpp", ".h", ".j2", ".csv"}:
                parts += [str(path.relative_to(ROOT)), path.read_bytes()]
    return content_key(*parts)


def run_stage(
    name: str, inputs: Mapping[str, str], produce: Callable[[Path], Mapping[str, Any]]
) -> StageResult:
    """Run `produce(directory)` unless a result for the same `inputs` is there, and return its result.

    `produce` may write further files into the directory; they appear together with the result or not at all.
    Raises `KVStrataError` if a stored result was written under another spec version.
    """
    key = content_key(SPEC_VERSION, json.dumps(dict(sorted(inputs.items()))))
    fresh = not (build_dir() / "chain" / name / key).is_dir()

    def build(work: Path) -> None:
        result = produce(work)
        header = {"stage": name, "spec_version": SPEC_VERSION, "inputs": dict(inputs)}
        (work / "result.json").write_text(json.dumps({**header, "result": result}, indent=1) + "\n")

    directory = cached_directory(f"chain/{name}", key, build)
    return StageResult(name, key, directory, read_result(directory / "result.json"), fresh)


def read_result(path: Path) -> dict[str, Any]:
    """Read a stage's result, refusing one of another spec version or one that is not whole."""
    try:
        stored = json.loads(path.read_text())
        version, result = stored["spec_version"], stored["result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KVStrataError(
            f"a stage result is a whole JSON file, but {path} is not: run make clean sim"
        ) from error
    if version != SPEC_VERSION:
        raise KVStrataError(
            f"{path} has spec version {version!r}, this is {SPEC_VERSION!r}: run make clean sim"
        )
    return result
