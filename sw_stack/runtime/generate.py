"""Greedy text on a device: prompt in, tokens, text, cycles and time out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from golden.loaders.checkpoint import Checkpoint
from golden.ops import argmax_lowest
from golden.spec import KVStrataError
from sw_stack.runtime.machine import Setup, open_session
from sw_stack.runtime.session import Session


@dataclass(frozen=True)
class DeviceRun:
    """What a device wrote. `cycles` is per token after the prompt (0 on a device without time); logits Q16."""

    setup: Setup
    prompt: str
    chat: bool
    prompt_tokens: int
    tokens: list[int]
    text: str
    prefill_seconds: float
    decode_seconds: float
    prefill_cycles: int
    cycles: list[int]
    logits: torch.Tensor

    @property
    def seconds_per_token(self) -> float:
        """Host seconds per token after the first."""
        return self.decode_seconds / max(1, len(self.tokens) - 1)

    def summary(self) -> str:
        """One line for people."""
        cycles = (
            f", {sum(self.cycles) // max(1, len(self.cycles)):,} cycles per token" if any(self.cycles) else ""
        )
        return (
            f"{len(self.tokens)} tokens on device {self.setup.device}, placement {self.setup.placement}: prefill "
            f"{self.prefill_seconds:.1f} s, then {self.seconds_per_token:.2f} s per token{cycles}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, with a hash in place of the logits."""
        stored = {k: v for k, v in self.__dict__.items() if k not in ("logits", "setup")}
        digest = hashlib.sha256(self.logits.numpy().astype("<i4").tobytes()).hexdigest()
        return {"setup": asdict(self.setup), **stored, "logits_sha256": digest}

    def require_equal(self, other: DeviceRun) -> None:
        """KVStrataError naming the first logit or token that another device computed differently."""
        mine, theirs = self.setup.device, other.setup.device
        for step, (a, b) in enumerate(zip(self.logits, other.logits)):
            wrong = (a != b).nonzero()
            if len(wrong):
                i = int(wrong[0])
                raise KVStrataError(
                    f"devices must compute the same logits; logit {i} of step {step} is {int(a[i])} on {mine} and "
                    f"{int(b[i])} on {theirs}"
                )
        if self.tokens != other.tokens:
            raise KVStrataError(f"devices must write the same tokens; got {self.tokens} and {other.tokens}")


def on_device(
    checkpoint: Checkpoint,
    setup: Setup,
    prompt: str,
    new_tokens: int,
    progress: Callable[[str], None] = lambda _: None,
    chat: bool = True,
    image: Path | None = None,
) -> DeviceRun:
    """Answer a prompt greedily, or continue it (`chat` False); stops early at the end-of-text token.

    KVStrataError when it does not fit.
    """
    if checkpoint.tokenizer is None:
        raise KVStrataError("generating text needs a tokenizer; the checkpoint holds none")
    ids = checkpoint.tokenizer.encode(checkpoint.tokenizer.chat(prompt) if chat else prompt)
    if len(ids) + new_tokens > setup.context:
        raise KVStrataError(
            f"prompt and answer must fit the context of {setup.context} tokens; got {len(ids)} and {new_tokens}"
        )
    session = open_session(checkpoint, setup, progress, image)
    try:
        return _decode(session, checkpoint, setup, prompt, chat, ids, new_tokens, progress)
    finally:
        session.device.close()


def _decode(
    session: Session,
    checkpoint: Checkpoint,
    setup: Setup,
    prompt: str,
    chat: bool,
    ids: list[int],
    new_tokens: int,
    progress: Callable[[str], None],
) -> DeviceRun:
    assert checkpoint.tokenizer is not None
    progress(f"prefill of {len(ids)} tokens")
    start = time.perf_counter()
    rows = [session.forward(ids)]
    prefilled, prefill_cycles = time.perf_counter(), session.cycles
    tokens, cycles = [int(argmax_lowest(rows[-1]))], []
    while len(tokens) < new_tokens and tokens[-1] != checkpoint.tokenizer.eos_id:
        progress(f"{len(tokens)}/{new_tokens} tokens: {checkpoint.tokenizer.decode(tokens)[-60:]}")
        before = session.cycles
        rows.append(session.forward(tokens[-1:]))
        cycles.append(session.cycles - before)
        tokens.append(int(argmax_lowest(rows[-1])))
    return DeviceRun(
        setup, prompt, chat, len(ids), tokens, checkpoint.tokenizer.decode(tokens), prefilled - start,
        time.perf_counter() - prefilled, prefill_cycles, cycles, torch.stack(rows),
    )  # fmt: skip
