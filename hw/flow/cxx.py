"""C++ as a shared library for `ctypes`, compiled once per source text."""

import ctypes
import os
import subprocess
from pathlib import Path

from golden.spec import KVStrataError

from .cache import cached_directory, content_key

FLAGS = ("-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC")
"""No fused multiply-add: results are those of the operations as written, on every processor."""


def shared_library(name: str, what: str, source: Path, *headers: Path) -> ctypes.CDLL:
    """Compile `source` with $CXX or g++; KVStrataError, naming it as `what`, when that fails."""
    compiler = os.environ.get("CXX", "g++")

    def build(work: Path) -> None:
        command = [compiler, *FLAGS, str(source), "-o", str(work / f"{name}.so")]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise KVStrataError(f"{what} needs the compiler {compiler}, which was not found") from None
        if result.returncode:
            raise KVStrataError(f"compiling {what} failed: {result.stderr[:400]}")

    texts = [file.read_bytes() for file in (source, *headers)]
    directory = cached_directory(name, content_key(compiler, *FLAGS, *texts), build)
    return ctypes.CDLL(str(directory / f"{name}.so"))
