"""The C++ compiler: its failures as sentences, and shared libraries for `ctypes`, compiled once per source text."""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from golden.spec import KVStrataError

from .cache import cached_directory, content_key

FLAGS = ("-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC")
"""No fused multiply-add: results are those of the operations as written, on every processor."""


def compiler() -> str:
    """The C++ compiler: $CXX or g++."""
    return os.environ.get("CXX", "g++")


def compile_with(command: Sequence[str], what: str, work: Path) -> None:
    """Run `command` in `work`; KVStrataError, naming what is compiled as `what`, when it is missing or fails."""
    try:
        result = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise KVStrataError(f"{what} needs {command[0]}, which was not found") from None
    if result.returncode:
        raise KVStrataError(f"compiling {what} failed: {result.stderr[:400]}")


def shared_library(name: str, what: str, source: Path, *headers: Path) -> ctypes.CDLL:
    """Compile `source`; KVStrataError, naming it as `what`, when that fails."""

    def build(work: Path) -> None:
        compile_with([compiler(), *FLAGS, str(source.resolve()), "-o", f"{name}.so"], what, work)

    texts = [file.read_bytes() for file in (source, *headers)]
    directory = cached_directory(name, content_key(compiler(), *FLAGS, *texts), build)
    return ctypes.CDLL(str(directory / f"{name}.so"))
