"""The durable store of a sweep: one SQLite file, a row per point, committed as it comes.

A point's key is the hash of everything its result depends on: the point, the fidelity, the spec version, the code and
presets of `sim`, the recurrences it runs, the measured cycles, and any file that the point names. So a resumed sweep
skips what is stored, and an edited preset or a new calibration computes anew instead of mixing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from golden.spec import SPEC_VERSION, KVStrataError
from sim import measured

SCHEMA = """
CREATE TABLE IF NOT EXISTS points (
  key TEXT PRIMARY KEY, sweep TEXT NOT NULL, ordinal INTEGER NOT NULL, point TEXT NOT NULL,
  status TEXT NOT NULL, result TEXT NOT NULL)
"""


class StoreError(KVStrataError):
    """The store cannot be used; the message says what to do."""


PACKAGE = Path(__file__).resolve().parent
RECURRENCE = sorted(
    path for name in ("batch*.py", "layout.py") for path in (PACKAGE.parent / "golden" / "storage").glob(name)
)
"""What the system model runs of the golden models."""


def inputs_hash() -> str:
    """Hash of the package's code, presets and data, of every measured table, and of the recurrences that it runs."""
    digest = hashlib.sha256(SPEC_VERSION.encode())
    packaged = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".toml", ".csv")]
    for path in sorted(packaged) + sorted(measured.CALIBRATION.glob("*.json")) + RECURRENCE:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def key_of(point: Mapping[str, Any], fidelity: str, inputs: str) -> str:
    """Key of a point; files that it names by path count with their contents."""
    named = [Path(v) for v in point.values() if isinstance(v, str) and v.endswith((".toml", ".json"))]
    contents = [hashlib.sha256(p.read_bytes()).hexdigest() for p in named if p.is_file()]
    text = json.dumps([inputs, fidelity, dict(point), contents], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _unreadable(path: Path, error: Exception) -> StoreError:
    return StoreError(f"sweep store {path} is not a readable database ({error}): move it away to start anew")


class Store:
    """Rows by key. `add` is durable when it returns: a kill -9 afterwards loses nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(SCHEMA)
            self._db.execute("SELECT key FROM points LIMIT 1").fetchall()
        except OSError as error:
            raise StoreError(f"sweep store {path} cannot be created ({error.strerror})") from None
        except sqlite3.OperationalError as error:
            if path.is_file():
                raise _unreadable(path, error) from None
            raise StoreError(f"sweep store {path} cannot be created ({error})") from None
        except sqlite3.DatabaseError as error:
            raise _unreadable(path, error) from None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def known(self) -> dict[str, dict[str, Any]]:
        """key -> {"status", "result"} of every stored point."""
        rows = self._rows("SELECT key, status, result FROM points")
        return {key: {"status": status, "result": self._value(key, result)} for key, status, result in rows}

    def _rows(self, query: str) -> list[Any]:
        try:
            return self._db.execute(query).fetchall()
        except sqlite3.DatabaseError as error:
            raise _unreadable(self.path, error) from None

    def _value(self, key: str, text: str) -> Any:
        try:
            return json.loads(text)
        except (TypeError, ValueError):
            raise StoreError(
                f"sweep store {self.path} holds a damaged row: DELETE FROM points WHERE key = '{key}' removes it, "
                "and the sweep computes it again"
            ) from None

    def add(
        self, key: str, sweep: str, ordinal: int, point: Mapping[str, Any], status: str, result: Any
    ) -> None:
        """Store one outcome; a key that exists already is an error of the caller."""
        row = (
            key,
            sweep,
            ordinal,
            json.dumps(dict(point), sort_keys=True),
            status,
            json.dumps(result, sort_keys=True),
        )
        with self._db:
            self._db.execute("INSERT INTO points VALUES (?, ?, ?, ?, ?, ?)", row)

    def table(self, keys: Iterable[str]) -> list[dict[str, Any]]:
        """Flat rows in the order of `keys`: point fields, status, and metrics or the reason of a refusal."""
        stored = {key: row for key, *row in self._rows("SELECT key, point, status, result FROM points")}
        rows = []
        for key in keys:
            point, status, result = stored[key]
            fields = self._value(key, result)
            outcome = fields if status == "ok" else {"error": fields}
            rows.append({**self._value(key, point), "status": status, **outcome})
        return rows


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as a Parquet table through a temporary name; a field that a row lacks is null."""
    import polars as pl

    temporary = path.with_suffix(path.suffix + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(rows, infer_schema_length=None, strict=False).write_parquet(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"table {path} cannot be written ({error.strerror or error})") from None
