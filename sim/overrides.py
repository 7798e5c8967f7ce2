"""`device.field=value` texts into typed overrides."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sim.describe.base import ConfigError


def parse(texts: Iterable[str]) -> dict[str, Any]:
    """{"csd.channels": 16} from ["csd.channels=16"]; numbers and true/false become themselves, the rest stays text."""
    overrides: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"an override has the form device.field=value, got {text!r}")
        overrides[path.strip()] = _value(value.strip())
    return overrides


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, int | float | bool) else text
