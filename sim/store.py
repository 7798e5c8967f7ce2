"""The durable store of a sweep: one SQLite file, a row per point, committed as it comes.

A point's key is the hash of everything its result depends on: the point, the fidelity, the spec version and the
measured cycles. So a resumed sweep skips what is stored, and a changed calibration computes anew instead of mixing.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
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


def calibration_hash() -> str:
    """Hash of every measured table."""
    digest = hashlib.sha256()
    for path in sorted(measured.CALIBRATION.glob("*.json")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def key_of(point: Mapping[str, Any], fidelity: str, calibration: str) -> str:
    """Key of a point."""
    text = json.dumps([SPEC_VERSION, calibration, fidelity, dict(point)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Store:
    """Rows by key. `add` is durable when it returns: a kill -9 afterwards loses nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(SCHEMA)
            self._db.execute("SELECT key FROM points LIMIT 1").fetchall()
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"sweep store {path} is not a readable database ({error}): move it away to start anew"
            ) from None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def known(self) -> dict[str, dict[str, Any]]:
        """key -> {"status", "result"} of every stored point."""
        rows = self._db.execute("SELECT key, status, result FROM points").fetchall()
        return {key: {"status": status, "result": json.loads(result)} for key, status, result in rows}

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

    def table(self, sweep: str) -> list[dict[str, Any]]:
        """Flat rows of a sweep in the order of its points: point fields, status, and metrics or the error."""
        query = "SELECT point, status, result FROM points WHERE sweep = ? ORDER BY ordinal"
        rows = []
        for point, status, result in self._db.execute(query, (sweep,)):
            fields = json.loads(result)
            rows.append(
                {**json.loads(point), "status": status, **(fields if status == "ok" else {"error": fields})}
            )
        return rows

    def write_parquet(self, sweep: str, path: Path) -> None:
        """Export a sweep through a temporary name."""
        import os

        import polars as pl

        temporary = path.with_suffix(path.suffix + ".part")
        pl.DataFrame(self.table(sweep), infer_schema_length=None, strict=False).write_parquet(temporary)
        os.replace(temporary, path)
