"""First link: the real model answers a prompt at every level, and leaves real operands for the RTL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golden.spec import KVStrataError

if TYPE_CHECKING:
    from torch import Tensor

    from golden.loaders import Checkpoint

DEFAULT_PROMPT = "Why does a language model need a key-value cache?"
CAPTURE_LAYER = 12
"""A layer in the middle of the model: neither embeddings nor the head shape its operands."""
CAPTURED_LINEARS = ("linear.k", "linear.o", "linear.down")
HEAD_ROWS = 4096
"""Rows of the W8 language-model head whose product is checked: the first of the vocabulary."""
LEVELS = {
    "float": ("float", "w4", "kv4"),
    "W4 A8 KV4": ("exact", "w4", "kv4"),
    "W4 A8 KV8": ("exact", "w4", "kv8"),
}
"""Level names of the report -> level, weight format and KV format of golden.llama.build."""


def check_prompt(prompt: str) -> None:
    """Raise `KVStrataError` for a prompt without a visible character."""
    if not prompt.strip():
        raise KVStrataError("a prompt has at least one character that is not a space, and this one has none")


def run(
    directory: Path,
    *,
    prompt: str,
    new_tokens: int,
    perplexity_tokens: int,
    model: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Generate at every level, measure perplexity, and write the captured operands to `directory`.

    Writes `operands.safetensors`: for each captured matrix product codes, scales, minima, activation codes and
    scale, accumulators and outputs; for one KV head the query, keys and values in float16.
    Raises `KVStrataError` for an empty prompt or fewer than one token.
    """
    from golden.llama import build, english_text, generate, load_model, perplexity

    check_prompt(prompt)
    progress("loading the model")
    checkpoint = load_model(model)
    ids = _chat_ids(checkpoint, prompt)
    levels: list[dict[str, Any]] = []
    accuracy: list[dict[str, Any]] = []
    reference: list[int] = []
    for name, (level, weights, kv) in LEVELS.items():
        progress(f"{name}: {new_tokens} tokens")
        decoder = build(checkpoint, level, weights, kv)
        answer = generate(decoder, ids, new_tokens, checkpoint=checkpoint)
        reference = reference or answer.tokens
        levels.append(
            {
                "name": name,
                "text": answer.text,
                "tokens": answer.tokens,
                **_agreement(reference, answer.tokens),
            }
        )
        progress(f"{name}: perplexity over {perplexity_tokens} tokens")
        measured = perplexity(decoder, checkpoint, english_text(), tokens=perplexity_tokens)
        accuracy.append({"level": name, "perplexity": measured.value})
        if (level, kv) == ("exact", "kv4"):
            _capture(decoder, ids + answer.tokens, directory)
    levels[0]["agreement"] = levels[0]["first_difference"] = None
    return {
        "generated": {
            "prompt": prompt,
            "prompt_tokens": len(ids),
            "new_tokens": len(reference),
            "levels": levels,
        },
        "accuracy": {
            "rows": accuracy,
            "tokens": measured.tokens,
            "text_name": measured.text_name,
            "text_sha256": measured.text_sha256,
        },
        "layer": CAPTURE_LAYER,
    }


def _chat_ids(checkpoint: Checkpoint, prompt: str) -> list[int]:
    if checkpoint.tokenizer is None:
        raise KVStrataError("answering a prompt needs a tokenizer, and the model holds none")
    return checkpoint.tokenizer.encode(checkpoint.tokenizer.chat(prompt))


def capture(directory: Path, prompt: str, progress: Callable[[str], None] = lambda _: None) -> None:
    """Operands of one step after `prompt`, without an answer: what the RTL check alone needs."""
    from golden.llama import build, load_model

    progress("loading the model")
    checkpoint = load_model(None)
    ids = _chat_ids(checkpoint, prompt)
    progress(f"reading {len(ids)} prompt tokens in the engine's arithmetic")
    _capture(build(checkpoint, "exact", "w4", "kv4"), ids, directory)


def _agreement(reference: list[int], tokens: list[int]) -> dict[str, Any]:
    equal = [a == b for a, b in zip(reference, tokens)]
    length = max(len(reference), len(tokens))
    first = next(
        (i for i, same in enumerate(equal) if not same), None if length == len(equal) else len(equal)
    )
    return {"agreement": sum(equal) / length, "first_difference": first}


def _product_operands(name: str, operands: Mapping[str, Any], rows: int | None) -> dict[str, Tensor]:
    weight, a8 = operands["weight"], operands["a8"]
    found = {
        "codes": weight.codes[:rows],
        "scale": weight.scale[:rows],
        "minimum": None if weight.minimum is None else weight.minimum[:rows],
        "a_codes": a8.codes[0],
        "a_mantissa": a8.mantissa.reshape(-1)[:1],
        "a_exponent": a8.exponent.reshape(-1)[:1],
        "acc": operands["acc"][0, :rows],
        "y": operands["y"][0, :rows],
    }
    return {f"{name}/{key}": value.clone() for key, value in found.items() if value is not None}


def _capture(decoder: Any, ids: list[int], directory: Path) -> None:
    """Operands of the last token's step in layer `CAPTURE_LAYER`, and of the head."""
    import torch
    from safetensors.torch import save_file

    from golden.vector_sets import first_head

    taken: dict[str, Tensor] = {}

    def probe(layer: int, operator: str, operands: Mapping[str, Any]) -> None:
        if operator == "linear.head":
            taken.update(_product_operands(operator, operands, HEAD_ROWS))
        elif layer == CAPTURE_LAYER and operator in CAPTURED_LINEARS:
            taken.update(_product_operands(operator, operands, None))
        elif layer == CAPTURE_LAYER and operator == "attention":
            taken.update(zip(("head/q", "head/k", "head/v"), first_head(operands)))

    cache = decoder.new_cache()
    decoder.forward(torch.tensor(ids[:-1]), cache, last_only=True)
    decoder.probe = probe
    decoder.forward(torch.tensor(ids[-1:]), cache, last_only=True)
    decoder.probe = None
    save_file({key: value.contiguous() for key, value in taken.items()}, directory / "operands.safetensors")
