"""The two commands as a user waits for them: `make sim` when nothing changed, and `make test` with builds cached."""

import subprocess
import time
from typing import Any

from hw.flow.cache import ROOT


def _seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def run() -> list[dict[str, Any]]:
    """`chain.sim_seconds`: second run of `make sim`; `chain.test_seconds`: `make test` after it."""
    _seconds("make", "sim")
    return [
        {
            "id": "chain.sim_seconds",
            "value": _seconds("make", "sim"),
            "unit": "s",
            "target": 60,
            "better": "lower",
        },
        {
            "id": "chain.test_seconds",
            "value": _seconds("make", "test"),
            "unit": "s",
            "target": 180,
            "better": "lower",
        },
    ]
