"""Quality of formats and policies on a real model: rows that are measured once and kept.

A row is a combination of level, weight recipe, activations, KV representation, policy and context length. Every row
predicts the same tokens of the same text: the last `TAIL` tokens before each of the `ENDS`, given the `context`
tokens before and among them. Metrics are against the float model at the same context, except passkey retrieval.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golden.compression import Recipe, bits_per_weight, calibrate_k_offset, compress
from golden.decoder import Decoder
from golden.exact_decoder import ExactDecoder
from golden.float_decoder import FloatDecoder
from golden.formats.kv import NAMES as KV_NAMES
from golden.formats.kv import codec
from golden.formats.weights import QuantisedWeight
from golden.lambda_window import LambdaWindow
from golden.llama import english_text, token_nll
from golden.loaders.checkpoint import Checkpoint
from golden.ops import from_q16
from golden.policies import Dense, KVPolicy, Lambda, Sparf, Sparq
from golden.policy_decoder import PolicyDecoder
from golden.spec import SPEC_VERSION, KVStrataError
from golden.spec.formats import KV_FORMATS
from golden.spec.policies import PolicyCosts
from golden.storage.decoder import Sparsity, StorageDecoder

ENDS = (9_000, 18_000)
"""Token positions of the text where the predicted segments end."""
TAIL = 192
"""Tokens predicted per segment. They are fed one after another as decode steps would be, after a prefill of the rest:
policies that compute prompts densely select only there."""
CALIBRATION = (60_000, 8, 512)
"""First token, windows, tokens per window: text that no row predicts."""
OFFSET_CALIBRATION = (60_000, 1024)
"""First token and tokens of the window from which the K offset is taken."""
CALIBRATED = "layer by layer"
"""How layers are calibrated; part of the key of the rows that are."""
CENTRED = "-centred"
"""Suffix of a KV representation whose keys lose a calibrated offset first (exact level; docs/formats.md section 7)."""
METHOD = "1"
"""Raised when the measurement changes, so that kept rows of another method are measured again."""
PASSKEY_DIGITS = 5


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


class Bench:
    """Text, references and compressed weights of one checkpoint, made when first needed.

    directory: where references and calibration are kept between runs.
    """

    def __init__(self, checkpoint: Checkpoint, directory: Path) -> None:
        if checkpoint.tokenizer is None:
            raise KVStrataError("accuracy needs a checkpoint with a tokenizer, got none.")
        self.checkpoint = checkpoint
        self.directory = directory
        self.text = english_text()
        self.tokenizer = checkpoint.tokenizer
        self.ids = torch.tensor(checkpoint.tokenizer.encode(self.text.text))
        self._weights: tuple[Recipe, dict[str, Tensor | QuantisedWeight]] | None = None
        self._decoder: tuple[tuple[type[Decoder], Recipe], Decoder] | None = None

    # --- inputs of a row ------------------------------------------------------------------------------
    def windows(self, context: int) -> list[Tensor]:
        """Token ids [context + 1] of each segment."""
        most = min(self.checkpoint.config.context, ENDS[0] - 1)
        if not TAIL < context <= most:
            raise KVStrataError(f"a context must be {TAIL + 1} to {most} tokens, got {context}.")
        return [self.ids[end - context - 1 : end] for end in ENDS]

    def _kept(self, name: str, make: Callable[[], dict[str, Tensor]], *which: int) -> dict[str, Tensor]:
        """Tensors of this checkpoint and method that are made once and kept in the directory."""
        from safetensors.torch import load_file, save_file

        parts = (name, self.checkpoint.sha256[:12], METHOD, *which)
        path = self.directory / f"{'-'.join(map(str, parts))}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            save_file(make(), temporary)
            temporary.replace(path)
        return load_file(path)

    def calibration(self) -> Tensor:
        """Token ids [windows, tokens] that recipes are calibrated on."""
        start, count, size = CALIBRATION
        return self.ids[start : start + count * size].view(count, size)

    def k_offset(self) -> Tensor:
        """The K offset of centred rows."""
        start, size = OFFSET_CALIBRATION
        window = self.ids[start : start + size]
        return self._kept("k-offset", lambda: {"k": calibrate_k_offset(self.checkpoint, [window])})["k"]

    def weights(self, recipe: Recipe) -> dict[str, Tensor | QuantisedWeight]:
        """Compressed weights; the last recipe is kept."""
        if self._weights is None or self._weights[0] != recipe:
            windows = self.calibration() if recipe.needs_calibration else None
            self._weights = (recipe, compress(self.checkpoint, recipe, windows))
        return self._weights[1]

    def decoder(self, row: Row) -> Decoder:
        """The decoder of a row; the last one is kept, and set up anew where only KV, activations or policy change."""
        if row.level not in ("float", "exact"):
            raise KVStrataError(f"a level must be float or exact, got {row.level}.")
        check_exact(row)
        wanted = (decoder_class(row), row.recipe)
        if self._decoder is None or self._decoder[0] != wanted:
            self._decoder = None  # two models at once would not be needed
            self._decoder = (wanted, self._build(row))
        decoder = self._decoder[1]
        c = self.checkpoint.config
        if isinstance(decoder, FloatDecoder):
            decoder.policy = parse_policy(row.policy, c.head_size, c.group)
            decoder.codec, decoder.activations = codec(row.kv), row.activations
        elif isinstance(decoder, StorageDecoder):
            decoder.sparsity = drive_sparsity(row.policy)
        elif isinstance(decoder, PolicyDecoder):
            decoder.policy, decoder.codec = parse_policy(row.policy, c.head_size, c.group), codec(row.kv)
        elif isinstance(decoder, ExactDecoder):
            kv, centred = row.kv.removesuffix(CENTRED), row.kv.endswith(CENTRED)
            decoder.window, decoder.kv_format = exact_window(row.policy), KV_FORMATS[kv]
            decoder.k_offset = self.k_offset() if centred else None
        return decoder

    def _build(self, row: Row) -> Decoder:
        weights = self.weights(row.recipe)
        chosen = decoder_class(row)
        if issubclass(chosen, FloatDecoder):
            return chosen(self.checkpoint, torch.float32, weights)
        codes = {name: w for name, w in weights.items() if isinstance(w, QuantisedWeight)}
        return chosen(self.checkpoint, codes)

    # --- measuring ------------------------------------------------------------------------------------
    def reference(self, context: int) -> dict[str, Tensor]:
        """Log-probabilities and attention outputs of the float model."""

        def make() -> dict[str, Tensor]:
            decoder = FloatDecoder(self.checkpoint)
            found: dict[str, Tensor] = {}
            for i, window in enumerate(self.windows(context)):
                logits, attention = run_window(decoder, window)
                found |= {f"logp.{i}": logits.log_softmax(-1).float(), f"attention.{i}": attention}
            return found

        return self._kept("reference", make, context)

    def measure(self, row: Row) -> dict[str, Any]:
        """All metrics of a row."""
        decoder, reference = self.decoder(row), self.reference(row.context)
        nll, agree, divergence, errors = [], [], [], []
        for i, window in enumerate(self.windows(row.context)):
            logits, attention = run_window(decoder, window)
            p = reference[f"logp.{i}"].double()
            logp = logits.log_softmax(-1)
            nll.append(token_nll(logits, window[-TAIL:]))
            agree.append((logits.argmax(-1) == p.argmax(-1)).double())
            divergence.append((p.exp() * (p - logp)).sum(-1))
            exact = reference[f"attention.{i}"]
            errors.append((attention - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1))
        layer_error = torch.stack(errors).mean(0)
        kv_bytes = self.kv_bytes(decoder, row)
        weights = self.weights(row.recipe)
        return {
            "name": row.name, "context": row.context, "level": row.level, "weights": row.recipe.name,
            "activations": row.activations, "kv": row.kv, "policy": row.policy,
            "perplexity": math.exp(min(torch.cat(nll).mean().item(), 50.0)),
            "top1_agreement": torch.cat(agree).mean().item(),
            "kl_nats": torch.cat(divergence).mean().item(),
            "attention_error": layer_error.mean().item(),
            "attention_error_by_layer": [round(e, 4) for e in layer_error.tolist()],
            "passkey": self.passkey(decoder, row.context),
            "bits_per_weight": bits_per_weight(weights),
            "weight_bytes_per_token": weight_bytes(weights, self.checkpoint),
            "kv_bytes_per_token": kv_bytes,
            "tokens": TAIL * len(ENDS), "text_sha256": self.text.sha256, "model_sha256": self.checkpoint.sha256,
        }  # fmt: skip

    def kv_bytes(self, decoder: Decoder, row: Row) -> float:
        """KV bytes that a decode step at the row's context reads, all layers and heads; pages as really selected."""
        c = self.checkpoint.config
        costs = self._costs(row)
        records: list[int] = []

        def collect(layer: int, operator: str, operands: dict[str, Any]) -> None:
            if operator == "selection":
                records.append(costs.step(operands["selection"]).read_bytes)
            elif operator == "attention" and isinstance(decoder, FloatDecoder):
                chosen = decoder.policy.records(operands["heads"], operands["selected"], layer)
                records.extend(costs.step(r).read_bytes for r in chosen)

        if not row.policy.startswith("sparf"):
            return float(costs.expected(row.context).read_bytes * c.layers * c.kv_heads)
        cache = decoder.new_cache()
        window = self.windows(row.context)[0][:-1]
        prefill(decoder, window[:-1], cache)
        decoder.probe = collect
        decoder.hidden(window[-1:], cache)
        decoder.probe = None
        return float(sum(records))

    def _costs(self, row: Row) -> PolicyCosts:
        from dataclasses import replace

        c = self.checkpoint.config
        representation = codec(row.kv.removesuffix(CENTRED)).representation
        return replace(parse_policy(row.policy, c.head_size, c.group).costs, representation=representation)

    def passkey(self, decoder: Decoder, context: int) -> float:
        """Share of a passkey's digits predicted first, hidden at 1/4 and 3/4 of the context (1/2 beyond 1,024)."""
        depths = (0.25, 0.75) if context <= 1024 else (0.5,)
        return sum(
            self._passkey_at(decoder, context, depth, seed) for seed, depth in enumerate(depths)
        ) / len(depths)

    def _passkey_at(self, decoder: Decoder, context: int, depth: float, seed: int) -> float:
        key = "".join(str((7 * seed + 3 * i * i + 5 * i + 1) % 10) for i in range(PASSKEY_DIGITS))
        needle = self.tokenizer.encode(f" The pass key is {key}. Remember it. {key} is the pass key.")
        question = self.tokenizer.encode("\nWhat is the pass key? The pass key is ")
        filler = self.tokenizer.encode(
            "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
            * (context // 16)
        )
        digits = self.tokenizer.encode(key)
        room = context - len(needle) - len(question) - len(digits)
        before = int(room * depth)
        cache = decoder.new_cache()
        prefill(decoder, torch.tensor(filler[:before] + needle + filler[before:room]), cache)
        hidden = decoder.hidden(question + digits[:-1], cache)[-len(digits) :]
        guesses = decoder.real_logits(decoder.logits(hidden)).argmax(-1).tolist()
        return sum(a == b for a, b in zip(guesses, digits)) / len(digits)


def decoder_class(row: Row) -> type[FloatDecoder] | type[ExactDecoder]:
    """What computes a row. Exact ones: the in-storage unit with the cache in binary16, the engine as RTL has it, or the
    engine's integers with what no RTL has."""
    if row.level == "float":
        return FloatDecoder
    if row.kv == "float":
        return StorageDecoder
    on_rtl = row.policy.partition(":")[0] in ("dense", "lambda-limit") and not row.kv.startswith("kivi")
    return ExactDecoder if on_rtl else PolicyDecoder


def check_exact(row: Row) -> None:
    """Refuse an exact row that no decoder computes."""
    if row.level == "exact" and (row.activations != "a8" or row.kv.removesuffix(CENTRED) not in KV_NAMES):
        raise KVStrataError(
            f"the exact level computes with a8 and a KV format of {', '.join(KV_NAMES)}, got {row.name}."
        )
    if row.level == "exact" and row.kv.endswith(CENTRED) and decoder_class(row) is PolicyDecoder:
        raise KVStrataError(f"a K offset goes with dense attention at the exact level, got {row.name}.")


def drive_sparsity(policy: str) -> Sparsity | None:
    """The in-storage unit's SparF of a row's policy text; None for dense."""
    kind, _, values = policy.partition(":")
    if policy == "dense":
        return None
    if kind != "sparf":
        raise KVStrataError(f"the in-storage unit attends densely or by sparf:r,share, got {policy}.")
    r, share = values.split(",")
    return Sparsity(r=int(r), ratio=round(1 / float(share)))


def exact_window(policy: str) -> LambdaWindow | None:
    """The engine's Lambda window of a row's policy text."""
    if policy == "dense":
        return None
    kind, _, values = policy.partition(":")
    if kind != "lambda-limit":
        raise KVStrataError(f"the engine attends densely or by lambda-limit:S+W, got {policy}.")
    sinks, window = (int(v) for v in values.split("+"))
    return LambdaWindow(sinks, window)


def prefill(decoder: Decoder, tokens: Tensor, cache: Any) -> None:
    """Feed a prompt under the policy's own rule for prompts."""
    if isinstance(decoder, StorageDecoder):
        sparsity, decoder.sparsity = decoder.sparsity, None
        decoder.hidden(tokens, cache)
        decoder.sparsity = sparsity
        return
    if not isinstance(decoder, (FloatDecoder, PolicyDecoder)):
        decoder.hidden(tokens, cache)
        return
    policy, decoder.policy = decoder.policy, decoder.policy.prefill()
    decoder.hidden(tokens, cache)
    decoder.policy = policy


def run_window(decoder: Decoder, window: Tensor) -> tuple[Tensor, Tensor]:
    """float64 logits [TAIL, V] of a window's last tokens, and float32 attention outputs [layers, TAIL, Hq*dh]."""
    layers: dict[int, list[Tensor]] = {}

    def collect(layer: int, operator: str, operands: dict[str, Any]) -> None:
        if operator == "linear.o":
            x = operands["x"]
            layers.setdefault(layer, []).append((from_q16(x) if x.dtype == torch.int64 else x).float())

    cache = decoder.new_cache()
    prefill(decoder, window[: -TAIL - 1], cache)
    decoder.probe = collect
    hidden = decoder.hidden(window[-TAIL - 1 : -1], cache)
    decoder.probe = None
    attention = torch.stack([torch.cat(layers[i]) for i in sorted(layers)])
    return decoder.real_logits(decoder.logits(hidden)), attention


def weight_bytes(weights: dict[str, Tensor | QuantisedWeight], checkpoint: Checkpoint) -> int:
    """Bytes of weights that a decode step reads: all layers and the head; float matrices count as fp16."""
    head = weights.get(checkpoint.head_name, checkpoint.float32(checkpoint.head_name))
    matrices = [w for name, w in weights.items() if name.startswith("layers.")] + [head]
    return sum(w.packed_bytes if isinstance(w, QuantisedWeight) else 2 * w.numel() for w in matrices)


# --- results ------------------------------------------------------------------------------------------
class Results:
    """Rows already measured, in SQLite: one JSON document per key, written as each row ends."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        with closing(self._open()) as db, db:
            db.execute("CREATE TABLE IF NOT EXISTS accuracy (key TEXT PRIMARY KEY, result TEXT NOT NULL)")

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60)

    def get(self, key: str) -> dict[str, Any] | None:
        """The result under a key, or None."""
        with closing(self._open()) as db:
            found = db.execute("SELECT result FROM accuracy WHERE key = ?", (key,)).fetchone()
        return json.loads(found[0]) if found else None

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Keep a result."""
        with closing(self._open()) as db, db:
            db.execute("INSERT OR REPLACE INTO accuracy VALUES (?, ?)", (key, json.dumps(result)))


def missing(rows: Iterable[Row], checkpoint: Checkpoint, text_sha256: str, results: Results) -> list[Row]:
    """The rows that have no kept result."""
    return [row for row in rows if results.get(row.key(checkpoint, text_sha256)) is None]


def measure_rows(rows: Sequence[Row], checkpoint: Checkpoint, directory: Path) -> Iterator[dict[str, Any]]:
    """Measure rows one after another and keep each as soon as it is done."""
    bench, results = Bench(checkpoint, directory), Results(directory / "results.sqlite")
    for row in rows:
        result = bench.measure(row)
        results.put(row.key(checkpoint, bench.text.sha256), result)
        yield result


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
"""Of the in-storage unit's binary16 attention, token by token in numpy: at the shortest context."""
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
