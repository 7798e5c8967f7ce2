"""Content-addressed build directories: built once under a temporary name, then renamed into place."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build_dir() -> Path:
    """Directory for everything generated: `$KVSTRATA_BUILD`, or `build/` beside the sources."""
    return Path(os.environ.get("KVSTRATA_BUILD", ROOT / "build"))


def content_key(*parts: str | bytes) -> str:
    """Hex key of the parts, in order; equal parts give an equal key on every machine."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:20]


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached_directory(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return `build_dir()/kind/key`, calling `build(temporary_directory)` if it is not there yet.

    Two processes that want the same key build it once. A build that raises leaves nothing behind.
    """
    final = build_dir() / kind / key
    if final.is_dir():
        return final
    with _locked(build_dir() / kind / f".{key}.lock"):
        if final.is_dir():
            return final
        work = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{key}."))
        try:
            build(work)
            work.rename(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final
