"""Rows of the accuracy table: what a combination is called, which are legal, which the committed table holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from golden.compression import Recipe
from golden.formats.kv import NAMES as KV_NAMES
from golden.formats.kv import codec
from golden.levels import LEVELS
from golden.loaders.checkpoint import Checkpoint
from golden.policies import Dense, KVPolicy, Lambda, Sparf, Sparq
from golden.spec import SPEC_VERSION, KVStrataError

CALIBRATED = "layer by layer"
"""How layers are calibrated; part of the key of the rows that are."""
CENTRED = "-centred"
"""Suffix of a KV representation whose keys lose a calibrated offset first (exact level; docs/formats.md section 7)."""
METHOD = "1"
"""Raised when the measurement changes, so that kept rows of another method are measured again."""


@dataclass(frozen=True)
class Row:
    """One combination; policy is written as `dense`, `lambda-limit:4+256`, `lambda-cache:4+256`, `sparq:16,0.125` or
    `sparf:16,0.125` (r channels, share of tokens)."""

    context: int
    level: str = "float"
    recipe: Recipe = Recipe("float")
    activations: str = "float"
    kv: str = "float"
    policy: str = "dense"

    @property
    def name(self) -> str:
        """Weights, activations, KV, policy and level in short."""
        return f"{self.recipe.name} {self.activations} {self.kv} {self.policy} ({self.level})"

    def key(self, checkpoint: Checkpoint, text_sha256: str) -> str:
        """Hash of everything that decides the result."""
        calibrated = [CALIBRATED] if self.recipe.needs_calibration else []
        what = json.dumps(
            [METHOD, SPEC_VERSION, asdict(self), checkpoint.sha256, text_sha256, *calibrated], sort_keys=True
        )
        return hashlib.sha256(what.encode()).hexdigest()


def parse_policy(text: str, head_size: int, group: int) -> KVPolicy:
    """A float policy from a row's text; KVStrataError for an unknown one."""
    kind, _, values = text.partition(":")
    try:
        if kind == "dense" and not values:
            return Dense(head_size, group)
        if kind in ("lambda-limit", "lambda-cache"):
            sinks, window = (int(v) for v in values.split("+"))
            return Lambda(head_size, group, sinks, window, kind.removeprefix("lambda-"))
        if kind in ("sparq", "sparf"):
            r, ratio = values.split(",")
            return {"sparq": Sparq, "sparf": Sparf}[kind](head_size, group, r=int(r), ratio=float(ratio))
    except ValueError:
        pass
    raise KVStrataError(
        f"a policy must be dense, lambda-limit:S+W, lambda-cache:S+W, sparq:r,share or sparf:r,share, got {text}."
    )


def check_row(row: Row) -> None:
    """Refuse a row that no decoder computes."""
    if row.level not in LEVELS:
        raise KVStrataError(f"a level must be {' or '.join(LEVELS)}, got {row.level}.")
    if row.activations not in ("float", "a8"):
        raise KVStrataError(f"activations must be float or a8, got {row.activations}.")
    if row.level == "exact" and (row.activations != "a8" or row.kv.removesuffix(CENTRED) not in KV_NAMES):
        raise KVStrataError(
            f"the exact level computes with a8 and a KV format of {', '.join(KV_NAMES)}, got {row.name}."
        )
    if row.level == "exact" and row.recipe.format == "float":
        raise KVStrataError(f"the exact level computes with quantised weights, got {row.name}.")
    codec(row.kv.removesuffix(CENTRED))


ASKED_LEVELS = {"float": ("float", "float"), "float-a8": ("float", "a8"), "exact": ("exact", "a8")}
"""A level and its activations by one word."""


def combinations(
    contexts: Sequence[int],
    weights: Sequence[str] | None = None,
    kv: Sequence[str] | None = None,
    policies: Sequence[str] | None = None,
    levels: Sequence[str] | None = None,
) -> list[Row]:
    """Every combination of the texts given; w4, kv4, dense and exact where none is."""
    for level in levels or []:
        if level not in ASKED_LEVELS:
            raise KVStrataError(f"a level must be one of {', '.join(ASKED_LEVELS)}, got {level}.")
    return [
        Row(context, ASKED_LEVELS[level][0], Recipe.parse(recipe), ASKED_LEVELS[level][1], cache, policy)
        for recipe in weights or ["w4"]
        for level in levels or ["exact"]
        for context in contexts
        for cache in kv or ["kv4"]
        for policy in policies or ["dense"]
    ]  # fmt: skip


# --- the standard grid ---------------------------------------------------------------------------------
PRUNED = tuple(Recipe("float", prune=p) for p in ("magnitude", "wanda", "sparsegpt"))
W4_EXACT = Recipe("w4")
FORMATS: tuple[tuple[Recipe, str, str, str], ...] = (
    (Recipe("float"), "float", "float", "float"),
    (Recipe("float"), "a8", "float", "float"),
    *((Recipe("float"), "float", kv, "float") for kv in ("kv8", "kv4", "kivi4", "kivi2")),
    (W4_EXACT, "a8", "kv8", "exact"),
    (W4_EXACT, "a8", "kv4", "exact"),
    (W4_EXACT, "a8", "kv4" + CENTRED, "exact"),
    (Recipe("w8"), "a8", "kv8", "exact"),
    (Recipe("w4", 64), "float", "float", "float"),
    (Recipe("w4", 64, rounding="gptq"), "float", "float", "float"),
    (Recipe("w2"), "float", "float", "float"),
    (Recipe("w2", 32, rounding="gptq"), "float", "float", "float"),
    *((recipe, "float", "float", "float") for recipe in PRUNED),
    (Recipe("w2s24", prune="magnitude"), "float", "float", "float"),
    (Recipe("w2s24", prune="sparsegpt", rounding="gptq"), "float", "float", "float"),
    (Recipe("w2s24", prune="sparsegpt", rounding="gptq"), "a8", "kv4", "exact"),
)
"""Weights, activations, KV, level; attention dense."""
POLICIES = (
    "lambda-limit:4+256", "lambda-cache:4+256", "lambda-limit:4+1024",
    "sparq:16,0.125", "sparf:16,0.125", "sparf:32,0.125",
)  # fmt: skip
DRIVE_POLICIES = ("dense", "sparf:16,0.125")
"""Of the in-storage unit's binary16 attention as RTL has it, in numpy: at the shortest context."""
SOFTWARE_FORMS = (
    ("kivi4", "dense"), ("kivi2", "dense"), ("kv4", "sparq:16,0.125"), ("kivi4", "sparq:16,0.125"),
    ("kv4", "lambda-cache:4+128"),
)  # fmt: skip
"""KV format and policy in the engine's integers without RTL (golden.policy_decoder)."""
LONGEST_POLICIES = ("lambda-limit:4+1024", "sparq:16,0.125", "sparf:16,0.125")
"""One of each family at the longest context, where a row takes minutes."""
SHORT_CONTEXTS, LONG_CONTEXTS = (256, 1024), (2048, 4096, 8192)


def grid(long: bool = True) -> Iterator[Row]:
    """The rows of the committed table: formats and policies at 256 and 1,024 tokens, then policies (and dense) at
    the long contexts. Rows that share weights follow each other."""
    float_weights = [f for f in FORMATS if f[0] == Recipe("float")]
    for context in SHORT_CONTEXTS:
        for recipe, activations, kv, level in float_weights:
            yield Row(context, level, recipe, activations, kv)
        yield from (Row(context, policy=p) for p in POLICIES if differs(p, context))
    for recipe, activations, kv, level in FORMATS[len(float_weights) :]:
        for context in SHORT_CONTEXTS:
            yield Row(context, level, recipe, activations, kv)
            if (recipe, kv, context) == (W4_EXACT, "kv8", 256):
                yield from (Row(context, level, recipe, activations, "float", p) for p in DRIVE_POLICIES)
            if (recipe, kv, context) == (W4_EXACT, "kv4", 256):
                yield from (Row(context, level, recipe, activations, *form) for form in SOFTWARE_FORMS)
            if (recipe, kv) == (W4_EXACT, "kv4") and context > 256:
                yield Row(context, level, recipe, activations, kv, "lambda-limit:4+256")
    for context in LONG_CONTEXTS if long else ():
        yield Row(context)
        policies = LONGEST_POLICIES if context == LONG_CONTEXTS[-1] else POLICIES
        yield from (Row(context, policy=p) for p in policies if differs(p, context))


def differs(policy: str, context: int) -> bool:
    """Whether a policy drops anything at a context."""
    return "+" not in policy or int(policy.split("+")[1]) < context
