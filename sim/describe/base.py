"""Preset files: TOML with unit-suffixed fields and a `[source]` table, validated into one-sentence errors.

Every field that a file sets needs an entry in `[source]`: a citation, or the id of an assumption registered in
docs/assumptions.d. Fields that a file leaves out take the default of the type, whose source is written beside it.
"""

from __future__ import annotations

import difflib
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from golden.spec import KVStrataError

PRESETS = Path(__file__).resolve().parents[1] / "presets"


class ConfigError(KVStrataError):
    """A description that breaks a rule: names the rule, the offending field and the value received."""


class CapacityError(KVStrataError):
    """A configuration that cannot run: names the limit, the excess and what would fit."""


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def assumed(default: Any, source: str, **rules: Any) -> Any:
    """A field with a default whose source (citation or assumption id) is reported with every result."""
    return Field(default, json_schema_extra={"source": source}, **rules)


class Described(BaseModel):
    """Base of all descriptions: frozen, unknown fields refused, values traced to their source."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str] = "description"
    unsourced: ClassVar[frozenset[str]] = frozenset({"name", "description", "source"})

    name: str
    description: str = ""
    source: dict[str, str] = Field(default_factory=dict)

    def provenance(self) -> list[dict[str, Any]]:
        """One row {device, field, value, source} per scalar value of this description."""
        rows = []
        for field, info in type(self).model_fields.items():
            value = getattr(self, field)
            if field in self.unsourced or value is None or isinstance(value, (BaseModel, dict)):
                continue
            extra = info.json_schema_extra
            default = extra.get("source", "") if isinstance(extra, dict) else ""
            source = self.source.get(field, default)
            rows.append(
                {"device": f"{self.kind}/{self.name}", "field": field, "value": value, "source": source}
            )
        return rows

    def replaced(self, **changes: Any) -> Self:
        """A validated copy with some fields changed; their source becomes "set by the user"."""
        source = {**self.source, **dict.fromkeys(changes, "set by the user")}
        kept = self.model_dump(exclude={"source"})
        return build(type(self), {**kept, **changes, "source": source}, f"{self.kind} {self.name}")


D = TypeVar("D", bound=Described)


def did_you_mean(word: str, known: list[str]) -> str:
    """` (did you mean X?)` for the nearest known word, or the empty string."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def build(cls: type[D], data: dict[str, Any], where: str) -> D:
    """Validate `data` as `cls`; a violation raises ConfigError with rule, offender and value received."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_sentence(cls, error, where)) from None


def _sentence(cls: type[BaseModel], error: ValidationError, where: str) -> str:
    # An unknown field is usually the misspelt required one: name it first.
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    field = ".".join(str(p) for p in first["loc"]) or cls.__name__
    known = sorted(cls.model_fields)
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown field {field} = {first['input']!r}{_unit_hint(field, known)}"
    if first["type"] == "missing":
        return f"{where}: field {field} is required and missing"
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}"
    return f"{where}: field {field}: {first['msg'][0].lower() + first['msg'][1:]}, got {first['input']!r}"


def _unit_hint(field: str, known: list[str]) -> str:
    stem = field.lower().replace("gbps", "gb_per_s").replace("gbit", "gb").replace("_gib", "_gb")
    hint = did_you_mean(stem, known)
    if hint and ("gbps" in field.lower() or "gbit" in field.lower()):
        hint += "; bandwidths are decimal gigabytes per second, so divide gigabits by 8"
    return hint


def listed(kind: str) -> list[str]:
    """Names of the presets of one kind."""
    return sorted(p.stem for p in (PRESETS / kind).glob("*.toml"))


def text_of(path: Path, what: str) -> str:
    """The text of a file that a user names; raises ConfigError where it does not exist or cannot be read."""
    try:
        return path.read_text()
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{what} {path} cannot be read (it is not text)") from None


def load(cls: type[D], ref: str | Path) -> D:
    """Load a preset by name, or a description from any TOML file by path.

    Raises ConfigError for an unknown name, a file that is not TOML, a missing source, or a broken rule.
    """
    path = Path(ref)
    if path.suffix != ".toml":
        path = PRESETS / cls.kind / f"{ref}.toml"
        if not path.is_file():
            known = listed(cls.kind)
            raise ConfigError(
                f"unknown {cls.kind} preset {str(ref)!r}{did_you_mean(str(ref), known)}; known: {', '.join(known)}"
            )
    try:
        stamp = path.stat()
    except FileNotFoundError:
        raise ConfigError(f"{cls.kind} file {path} does not exist") from None
    return _loaded(cls, path, (stamp.st_mtime_ns, stamp.st_size))


@lru_cache(maxsize=512)
def _loaded(cls: type[D], path: Path, stamp: tuple[int, int]) -> D:
    """Descriptions are frozen, so that a file is read once for as long as its `stamp` stays."""
    try:
        data = tomllib.loads(text_of(path, f"{cls.kind} file"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{cls.kind} file {path} is not valid TOML: {error}") from None
    return _sourced(cls, data, path)


def _sourced(cls: type[D], data: dict[str, Any], path: Path) -> D:
    described = build(cls, data, f"{cls.kind} {path.stem}")
    sources = described.source
    for field in data:
        if field not in cls.unsourced and field not in sources and not isinstance(data[field], dict):
            raise ConfigError(
                f"{cls.kind} {path.stem}: value {field} = {data[field]!r} has no entry in [source]"
            )
    for field in sources:
        if field not in cls.model_fields:
            hint = did_you_mean(field, sorted(cls.model_fields))
            raise ConfigError(f"{cls.kind} {path.stem}: [source] names unknown field {field}{hint}")
    return described
