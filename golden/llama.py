"""Text from a Llama checkpoint at a level: load, generate greedily, measure perplexity on real English text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from golden.decoder import Decoder
from golden.exact_decoder import ExactDecoder
from golden.float_decoder import FloatDecoder
from golden.lambda_window import LambdaWindow
from golden.loaders import Checkpoint, load
from golden.ops import argmax_lowest
from golden.spec import KVStrataError
from golden.spec.formats import kv_format, weight_format

LEVELS = ("float", "exact")


def build(
    checkpoint: Checkpoint,
    level: str = "float",
    weights: str = "w4",
    kv: str = "kv4",
    window: LambdaWindow | None = None,
) -> Decoder:
    """A decoder at a level: `float` (float32 reference) or `exact` (engine integers, weights and kv formats, dense or
    over a Lambda window)."""
    check_build(level, weights, kv, window)
    return FloatDecoder(checkpoint) if level == "float" else ExactDecoder(checkpoint, weights, kv, window)


def check_build(level: str, weights: str, kv: str, window: LambdaWindow | None = None) -> None:
    """KVStrataError for what `build` makes of no checkpoint."""
    if level not in LEVELS:
        raise KVStrataError(f"a level must be one of {', '.join(LEVELS)}, got {level}.")
    weight_format(weights), kv_format(kv)
    if level == "float" and window:
        raise KVStrataError("policy lambda is of level exact or of a device, got level float.")


@dataclass(frozen=True)
class Generation:
    """Greedy output: prompt ids, new token ids, logits float64 [n, V] that chose them, text of the answer."""

    prompt: list[int]
    tokens: list[int]
    logits: Tensor
    text: str


def generate(
    model: Checkpoint | Decoder,
    prompt: str | Sequence[int],
    n: int,
    level: str = "float",
    weights: str = "w4",
    kv: str = "kv4",
    checkpoint: Checkpoint | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Greedy decoding of n tokens (fewer if the model ends); the lowest index wins among equal logits.

    model: a checkpoint (a decoder is built at `level`) or a decoder, with `checkpoint` then for its tokenizer.
    prompt: text (encoded as given; use `checkpoint.tokenizer.chat` for a chat turn) or token ids.
    """
    if n < 1:
        raise KVStrataError(f"the number of tokens to generate must be at least 1, got {n}.")
    decoder = model if isinstance(model, Decoder) else build(model, level, weights, kv)
    source = model if isinstance(model, Checkpoint) else checkpoint
    tokenizer = source.tokenizer if source else None
    if isinstance(prompt, str):
        if tokenizer is None:
            raise KVStrataError("a text prompt needs a checkpoint with a tokenizer, got none.")
        prompt = tokenizer.encode(prompt)
    ids, cache = list(prompt), decoder.new_cache()
    step = torch.tensor(ids, dtype=torch.int64)
    tokens: list[int] = []
    rows = []
    while len(tokens) < n:
        logits = decoder.forward(step, cache, last_only=True)
        tokens.append(int(argmax_lowest(logits)[0]))
        rows.append(decoder.real_logits(logits)[0])
        if on_token is not None:
            on_token(tokens[-1])
        if tokenizer is not None and tokens[-1] == tokenizer.eos_id:
            break
        step = torch.tensor(tokens[-1:])
    return Generation(ids, tokens, torch.stack(rows), tokenizer.decode(tokens) if tokenizer else "")


# --- perplexity on real text ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Text:
    """English text and the SHA-256 of its UTF-8 bytes."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Hex digest."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def english_text(path: str | Path | None = None) -> Text:
    """A file's text or, by default, the language reference that ships with CPython (pydoc_data.topics)."""
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise KVStrataError(f"a text must be an existing file, got {path}.")
        return Text(path.name, path.read_text(encoding="utf-8"))
    from pydoc_data.topics import topics

    return Text("pydoc_data.topics", "\n".join(topics[key] for key in sorted(topics)))


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log likelihood) over `tokens` predictions, with the hash of the text."""

    value: float
    tokens: int
    text_name: str
    text_sha256: str


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood [T] in nats of targets [T] under float64 logits [T, V]."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def perplexity(
    decoder: Decoder, checkpoint: Checkpoint, text: Text | None = None, tokens: int = 256, context: int = 256
) -> Perplexity:
    """Perplexity over the first `tokens` tokens of a text, in independent windows of `context`.

    Each window predicts its tokens 1..context-1 from those before. KVStrataError if the text is too short.
    """
    text = text or english_text()
    if checkpoint.tokenizer is None:
        raise KVStrataError("perplexity needs a checkpoint with a tokenizer, got none.")
    if not 2 <= context <= decoder.config.context or tokens < context:
        raise KVStrataError(
            f"perplexity needs 2 <= context <= {decoder.config.context} and tokens >= context, got {context}, {tokens}."
        )
    ids = checkpoint.tokenizer.encode(text.text[: tokens * 16])[:tokens]
    if len(ids) < tokens:
        raise KVStrataError(f"the text {text.name} must have at least {tokens} tokens, got {len(ids)}.")
    losses = []
    for start in range(0, tokens - context + 1, context):
        window = torch.tensor(ids[start : start + context])
        logits = decoder.real_logits(decoder.forward(window[:-1], decoder.new_cache()))
        losses.append(token_nll(logits, window[1:]))
    nll = torch.cat(losses)
    return Perplexity(math.exp(nll.mean().item()), len(nll), text.name, text.sha256)


def load_model(path: str | Path | None = None) -> Checkpoint:
    """SmolLM2, or the checkpoint at a path."""
    return load(path)
