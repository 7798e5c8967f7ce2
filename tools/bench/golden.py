"""Speed of the golden models: tokens/s of each level, operators against torch's own, quantisation and packing."""

import resource
import time
from collections.abc import Callable

import torch

from golden import ops
from golden.decoder import Decoder
from golden.formats.packing import pack_weight
from golden.formats.weights import quantise_weight
from golden.llama import build, english_text
from golden.loaders import load
from golden.policies import Dense, Heads, Sparf
from golden.spec.formats import W4

PROMPT, STEPS = 64, 16


def run() -> list[dict]:
    """Rows of this area."""
    checkpoint = load()
    ids = checkpoint.tokenizer.encode(english_text().text[:20_000])[:1024]
    rows = []
    for level, target in (("float", None), ("exact", 2.0)):
        decoder = build(checkpoint, level)
        rows.append(
            row(
                f"golden.{level}.decode_tokens_per_s", decode_rate(decoder, ids), "tokens/s", target, "higher"
            )
        )
    seconds = timed(lambda: decoder.forward(ids, decoder.new_cache(), last_only=True))
    rows.append(row("golden.exact.prefill1024_s", seconds, "s", 60.0, "lower"))
    return rows + formats() + [sparf()] + operators() + [memory()]


def row(name: str, value: float, unit: str, target: float | None, better: str) -> dict:
    """One result."""
    return {"id": name, "value": value, "unit": unit, "target": target, "better": better}


def timed(work: Callable[[], object], repeats: int = 1) -> float:
    """Seconds per call, the best of `repeats`."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def decode_rate(decoder: Decoder, ids: list[int]) -> float:
    """Tokens/s of decode steps after a short prompt."""
    cache = decoder.new_cache()
    decoder.forward(ids[:PROMPT], cache, last_only=True)
    start = time.perf_counter()
    for token in ids[PROMPT : PROMPT + STEPS]:
        decoder.forward([token], cache, last_only=True)
    return STEPS / (time.perf_counter() - start)


def formats() -> list[dict]:
    """MB/s of float32 weights quantised to W4, and of W4 images packed."""
    weight = torch.randn(1536, 4096)
    quantised = quantise_weight(weight, W4)
    rate = weight.numel() * 4 / 1e6 / timed(lambda: quantise_weight(weight, W4), 3)
    packed = quantised.packed_bytes / 1e6 / timed(lambda: pack_weight(quantised), 3)
    return [
        row("golden.quantize.mb_per_s", rate, "MB/s", None, "higher"),
        row("golden.pack.mb_per_s", packed, "MB/s", None, "higher"),
    ]


def sparf(tokens: int = 4096, head_size: int = 64) -> dict:
    """Time of a SparF step over that of a dense step in the golden model (which scores every token in both)."""
    q, k, v = (torch.randn(3, n, head_size) for n in (1, tokens, tokens))
    heads = Heads(q[:, None], q[:, None], k, k, v, torch.tensor([tokens - 1]), lambda x, _: x)
    policies = Sparf(head_size), Dense(head_size)
    times = [timed(lambda p=p: p.attend(heads, p.select(heads)), 5) for p in policies]
    return row("golden.sparf.ratio_to_dense", times[0] / times[1], "", None, "lower")


def operators() -> list[dict]:
    """ns per element of each exact operator and the ratio to torch's nearest float32 operation."""
    x = torch.randint(-(1 << 20), 1 << 20, (256, 1536))
    y, real = x.flip(0), x.float() / 65536
    norm = ops.prepare_norm(torch.ones(1536), 1e-5)
    weight = torch.randint(-(1 << 20), 1 << 20, (1536, 1536)).double()
    a8 = ops.quantise_a8(x)
    cos, sin = ops.rope_table(torch.arange(256), 1536, 1e4)
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "a8": (lambda: ops.quantise_a8(x), lambda: (real * 10).round().clamp(-127, 127).to(torch.int8)),
        "rmsnorm": (lambda: ops.rmsnorm(x, norm), lambda: torch.nn.functional.rms_norm(real, (1536,))),
        "rope": (lambda: ops.rope(x, cos, sin), lambda: real * real + real),
        "exp2": (lambda: ops.exp2_neg(x.abs()), lambda: torch.exp2(real)),
        "gate": (lambda: ops.gate_product(x, y), lambda: torch.nn.functional.silu(real) * real),
        "kv4": (
            lambda: ops.quantise_kv(x.view(-1, 64), 4),
            lambda: (real * 10).round().clamp(0, 15).to(torch.uint8),
        ),
        "product": (lambda: ops.accumulate(a8.codes, weight), lambda: real @ weight.float().T),
    }
    rows = []
    for name, (exact, native) in pairs.items():
        seconds, base = timed(exact, 3), timed(native, 3)
        rows.append(row(f"golden.op.{name}.ns_per_element", seconds / x.numel() * 1e9, "ns", None, "lower"))
        rows.append(row(f"golden.op.{name}.ratio_to_torch", seconds / base, "", None, "lower"))
    return rows


def memory() -> dict:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return row("golden.memory_peak_mb", peak, "MB", None, "lower")
