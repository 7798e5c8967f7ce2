"""Quality of formats and policies on a real model: rows that are measured once and kept.

A row is a combination of level, weight recipe, activations, KV representation, policy and context length. Every row
predicts the same tokens of the same text: the last `TAIL` tokens before each of the `ENDS`, given the `context`
tokens before and among them. Metrics are against the float model at the same context, except passkey retrieval.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golden.accuracy_rows import CENTRED, METHOD, Row, check_row, parse_policy
from golden.compression import Recipe, bits_per_weight, calibrate_k_offset, compress
from golden.decoder import Decoder
from golden.float_decoder import FloatDecoder
from golden.formats.kv import codec
from golden.formats.weights import QuantisedWeight
from golden.levels import build, check_policy, decoder_class, set_attention
from golden.llama import english_text, token_nll
from golden.loaders.checkpoint import Checkpoint
from golden.ops import from_q16
from golden.policies import KVPolicy
from golden.policy_decoder import PolicyDecoder
from golden.spec import KVStrataError
from golden.spec.policies import FP16, PolicyCosts, SparfCosts
from golden.storage.policy_decoder import StoragePolicyDecoder

ENDS = (9_000, 18_000)
"""Token positions of the text where the predicted segments end."""
TAIL = 192
"""Tokens predicted per segment. They are fed one after another as decode steps would be, after a prefill of the rest:
policies that compute prompts densely select only there."""
CALIBRATION = (60_000, 8, 512)
"""First token, windows, tokens per window: text that no row predicts."""
OFFSET_CALIBRATION = (60_000, 1024)
"""First token and tokens of the window from which the K offset is taken."""
PASSKEY_DIGITS = 5


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
        check_context(context, self.checkpoint)
        return [self.ids[end - context - 1 : end] for end in ENDS]

    def _kept(self, name: str, make: Callable[[], dict[str, Tensor]], *which: int) -> dict[str, Tensor]:
        """Tensors of this checkpoint and method that are made once and kept in the directory."""
        from safetensors.torch import load_file, save_file

        parts = (name, self.checkpoint.sha256[:12], METHOD, *which)
        path = self.directory / f"{'-'.join(map(str, parts))}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(
                f".{path.name}.{os.getpid()}.tmp"
            )  # rows side by side may make the same
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
        check_row(row)
        kv, centred = row.kv.removesuffix(CENTRED), row.kv.endswith(CENTRED)
        policy = self.policy(row)
        wanted = (decoder_class(row.level, kv, policy, centred), row.recipe)
        if self._decoder is None or self._decoder[0] != wanted:
            self._decoder = None  # two models at once would not be needed
            self._decoder = (wanted, build(self.checkpoint, row.level, self.weights(row.recipe), kv, policy))
        decoder = self._decoder[1]
        set_attention(decoder, kv, policy, self.k_offset() if centred else None)
        if isinstance(decoder, FloatDecoder):
            decoder.activations = row.activations
        return decoder

    def policy(self, row: Row) -> KVPolicy:
        """The policy of a row on this model."""
        c = self.checkpoint.config
        return parse_policy(row.policy, c.head_size, c.group)

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

        if not isinstance(costs, SparfCosts):
            return float(costs.expected(row.context).read_bytes * c.layers * c.kv_heads)
        cache = decoder.new_cache()
        window = self.windows(row.context)[0][:-1]
        prefill(decoder, window[:-1], cache)
        decoder.probe = collect
        decoder.hidden(window[-1:], cache)
        decoder.probe = None
        return float(sum(records))

    def _costs(self, row: Row) -> PolicyCosts:
        costs, representation = self.policy(row).costs, codec(row.kv.removesuffix(CENTRED)).representation
        if isinstance(costs, SparfCosts) and representation != FP16:
            return costs.entries(representation)
        return replace(costs, representation=representation)

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


def check_rows(rows: Sequence[Row], checkpoint: Checkpoint) -> None:
    """Refuse a row that this model cannot have, before anything is measured."""
    c = checkpoint.config
    for row in rows:
        check_context(row.context, checkpoint)
        check_policy(parse_policy(row.policy, c.head_size, c.group), c)
        for _, k in c.linear_shapes().values():
            row.recipe.weight_format(k)


def check_context(context: int, checkpoint: Checkpoint) -> None:
    """Refuse a context that the text's segments or the model do not hold."""
    most = min(checkpoint.config.context, ENDS[0] - 1)
    if not TAIL < context <= most:
        raise KVStrataError(f"a context must be {TAIL + 1} to {most} tokens, got {context}.")


def prefill(decoder: Decoder, tokens: Tensor, cache: Any) -> None:
    """Feed a prompt under the policy's own rule for prompts."""
    if not isinstance(decoder, (FloatDecoder, PolicyDecoder, StoragePolicyDecoder)):
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
