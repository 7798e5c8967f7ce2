"""Greedy text on a device: prompt in, tokens, text, cycles and time out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from golden.loaders.checkpoint import Checkpoint
from golden.ops import argmax_lowest
from golden.spec import KVStrataError
from sw_stack.runtime.batch import BatchSession
from sw_stack.runtime.machine import Setup, open_lockstep, open_session
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
    lockstep: bool = False,
) -> DeviceRun:
    """Answer a prompt greedily, or continue it (`chat` False); stops early at the end-of-text token.

    `lockstep`: beside the golden decoder. KVStrataError when it does not fit, or names the first tensor that differs.
    """
    ids = _encoded(checkpoint, setup, prompt, new_tokens, chat)
    pair = open_lockstep(checkpoint, setup, progress, image) if lockstep else None
    session = pair.session if pair else open_session(checkpoint, setup, progress, image)
    forward = pair.require if pair else session.forward
    try:
        return _decode(session, forward, checkpoint, setup, prompt, chat, ids, new_tokens, progress)
    finally:
        session.device.close()


def _encoded(checkpoint: Checkpoint, setup: Setup, prompt: str, new_tokens: int, chat: bool) -> list[int]:
    if checkpoint.tokenizer is None:
        raise KVStrataError("generating text needs a tokenizer; the checkpoint holds none")
    ids = checkpoint.tokenizer.encode(checkpoint.tokenizer.chat(prompt) if chat else prompt)
    if len(ids) + new_tokens > setup.context:
        raise KVStrataError(
            f"prompt and answer must fit the context of {setup.context} tokens; got {len(ids)} and {new_tokens}"
        )
    return ids


def batch_on_device(
    checkpoint: Checkpoint,
    setup: Setup,
    prompts: Sequence[str],
    new_tokens: int,
    progress: Callable[[str], None] = lambda _: None,
    chat: bool = True,
    image: Path | None = None,
) -> list[DeviceRun]:
    """Answer several prompts as one batch (`setup.sequences` of them), each as `on_device` answers it alone.

    Times and cycles are those of the batch: a step serves every sequence that still writes. KVStrataError when a
    prompt does not fit.
    """
    ids = [_encoded(checkpoint, setup, prompt, new_tokens, chat) for prompt in prompts]
    session = open_session(checkpoint, setup, progress, image)
    assert isinstance(session, BatchSession)
    try:
        return _decode_batch(session, checkpoint, setup, prompts, chat, ids, new_tokens, progress)
    finally:
        session.device.close()


def _decode_batch(
    session: BatchSession,
    checkpoint: Checkpoint,
    setup: Setup,
    prompts: Sequence[str],
    chat: bool,
    ids: list[list[int]],
    new_tokens: int,
    progress: Callable[[str], None],
) -> list[DeviceRun]:
    assert checkpoint.tokenizer is not None
    progress(f"prompts of {', '.join(str(len(i)) for i in ids)} tokens")
    rows: list[list[torch.Tensor]] = [[] for _ in ids]
    tokens: list[list[int]] = [[] for _ in ids]
    cycles: list[list[int]] = [[] for _ in ids]
    start = time.perf_counter()
    step, prefilled, prefill_cycles = ids, start, 0
    while any(step):
        before = session.cycles
        for s, logits in enumerate(session.forward_batch(step)):
            if logits is not None:
                rows[s].append(logits)
                cycles[s].append(session.cycles - before)
                tokens[s].append(int(argmax_lowest(logits)))
        if step is ids:
            prefilled, prefill_cycles = time.perf_counter(), session.cycles
        going = [len(t) < new_tokens and t[-1] != checkpoint.tokenizer.eos_id for t in tokens]
        step = [t[-1:] if more else [] for t, more in zip(tokens, going)]
        progress(f"{max(map(len, tokens))}/{new_tokens} tokens")
    seconds = prefilled - start, time.perf_counter() - prefilled
    return [
        DeviceRun(
            setup, prompt, chat, len(ids[s]), tokens[s], checkpoint.tokenizer.decode(tokens[s]), *seconds,
            prefill_cycles, cycles[s][1:], torch.stack(rows[s]),
        )
        for s, prompt in enumerate(prompts)
    ]  # fmt: skip


def _decode(
    session: Session,
    forward: Callable[[Sequence[int]], torch.Tensor],
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
    rows = [forward(ids)]
    prefilled, prefill_cycles = time.perf_counter(), session.cycles
    tokens, cycles = [int(argmax_lowest(rows[-1]))], []
    while len(tokens) < new_tokens and tokens[-1] != checkpoint.tokenizer.eos_id:
        progress(f"{len(tokens)}/{new_tokens} tokens: {checkpoint.tokenizer.decode(tokens)[-60:]}")
        before = session.cycles
        rows.append(forward(tokens[-1:]))
        cycles.append(session.cycles - before)
        tokens.append(int(argmax_lowest(rows[-1])))
    return DeviceRun(
        setup, prompt, chat, len(ids), tokens, checkpoint.tokenizer.decode(tokens), prefilled - start,
        time.perf_counter() - prefilled, prefill_cycles, cycles, torch.stack(rows),
    )  # fmt: skip
