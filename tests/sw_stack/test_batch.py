"""Batches on the engine: every sequence's logits are those of the golden model alone, whatever the others do."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from golden.config import DecoderConfig
from golden.loaders import Checkpoint
from golden.spec import KVStrataError
from golden.spec.engine import SMALL, TINY, U280, EngineConfig, Op
from golden.spec.memory import MemoryModel
from sw_stack.compile.batch import compile_batch
from sw_stack.compile.memory import MemoryTiming
from sw_stack.device.rtl import RtlDevice
from sw_stack.device.timing import TimingDevice
from sw_stack.pack.memory_map import MemoryMap
from sw_stack.runtime.generate import batch_on_device, on_device
from sw_stack.runtime.machine import Setup
from tests.sw_stack.machines import OPT, SHAPE, MakeMachine
from tests.sw_stack.test_compile import GROUP3_WIDE, prompt

LAYER = dataclasses.replace(SHAPE, layers=1)
PROMPTS = (5, 37, 2)
"""Tokens of each sequence's prompt: one goes over a tile of 32 slots, all end at different steps."""


@pytest.mark.parametrize(
    ("shape", "engine", "weights"),
    [
        (LAYER, TINY, "w2"),
        pytest.param(SHAPE, SMALL, "w4", marks=pytest.mark.slow),
        pytest.param(GROUP3_WIDE, U280, "w2s24", marks=pytest.mark.slow),
        pytest.param(OPT, SMALL, "w8", marks=pytest.mark.slow),
    ],
    ids=["llama tiny", "llama small", "grouped u280", "opt small"],
)
def test_a_batch_equals_the_golden_batch(
    machine: MakeMachine, shape: DecoderConfig, engine: EngineConfig, weights: str
) -> None:
    made = machine(shape, engine, weights, context=64, sequences=3)
    batch, caches = made.batch(seed=5), [made.golden.new_cache() for _ in PROMPTS]
    ids = [prompt(shape.vocab, n, seed=n) for n in PROMPTS]
    for step in (ids, [[3], [], [9]], [[1], [2, 4], []]):
        got = batch.forward_batch(step)
        live = [s for s, new in enumerate(step) if new]
        expected = made.golden.forward_batch([(step[s], caches[s]) for s in live])
        assert [s for s, logits in enumerate(got) if logits is not None] == live
        for s, want in zip(live, expected, strict=True):
            assert torch.equal(got[s], want)
    assert batch.lengths == [cache.length for cache in caches]


def test_weights_stream_once_for_all_sequences(machine: MakeMachine) -> None:
    """Products of a layer are there once with all vectors; what a step loads besides are the caches."""
    made = machine(sequences=4)
    programs, matrices = made.programs.programs, made.programs.map.matrices.values()
    shared = [i for name, p in programs.items() if not name.startswith("attend") for i in p.instructions]
    loaded = sum(i.values["count"] for i in shared if i.op is Op.LOAD)
    assert loaded == sum(m.words for m in matrices)
    assert {i.values["vectors"] for i in shared if i.op is Op.MATRIX} == {4}


def test_what_does_not_fit_harms_no_other_sequence(machine: MakeMachine) -> None:
    made = machine(LAYER, context=8, sequences=2)
    batch, cache = made.batch(), made.golden.new_cache()
    ids = prompt(LAYER.vocab, 4)
    batch.forward_batch([prompt(LAYER.vocab, 8, seed=1), ids])
    with pytest.raises(
        KVStrataError, match="sequence 0 of the batch: the memory map holds a context of 8 tokens"
    ):
        batch.forward_batch([[1], [2]])
    with pytest.raises(KVStrataError, match="sequence 1 of the batch: a token id must be 0 to 159; got 160"):
        batch.forward_batch([[], [160]])
    with pytest.raises(KVStrataError, match="a batch has 2 sequences; got tokens for 1"):
        batch.forward_batch([[1]])
    expected = made.golden.forward([*ids, 2], cache, last_only=True)[0]
    assert torch.equal(batch.forward_batch([[], [2]])[1], expected)
    with pytest.raises(
        KVStrataError, match="a batch has 1 to 16 sequences on small, and 1 over a ring; got 17"
    ):
        MemoryMap(LAYER, SMALL, "w4", "kv4", 64, None, 17)
    with pytest.raises(KVStrataError, match="a batch has at least 2 sequences; got 1"):
        compile_batch(dataclasses.replace(made.programs.map, sequences=1), made.image.norm_exponents)


@pytest.mark.slow
def test_prompts_of_a_batch_are_answered_as_alone(two_layers: Checkpoint) -> None:
    setup = Setup("small", "golden", context=32, sequences=2)
    prompts = ["Once upon a time", "The"]
    runs = batch_on_device(two_layers, setup, prompts, 4, chat=False)
    for run, text in zip(runs, prompts, strict=True):
        run.require_equal(on_device(two_layers, dataclasses.replace(setup, sequences=1), text, 4, chat=False))
        assert len(run.tokens) == 4
    with pytest.raises(
        KVStrataError, match="a batch needs placement engine and dense attention; got 2 sequences"
    ):
        Setup(placement="csd", sequences=2)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SHAPE, OPT], ids=["llama", "opt"])
def test_a_batch_on_the_rtl_is_exact_and_predicted(machine: MakeMachine, shape: DecoderConfig) -> None:
    """Three sequences of different lengths; every run within two percent."""
    made = machine(shape, TINY, context=64, sequences=3)
    memory = MemoryModel("fixed", latency_cycles=20)
    rtl, timing = (
        made.batch(RtlDevice(made.image, memory)),
        made.batch(TimingDevice(made.image, MemoryTiming.of(memory))),
    )
    caches = [made.golden.new_cache() for _ in PROMPTS]
    try:
        for step in ([prompt(shape.vocab, n, seed=n) for n in (2, 5, 1)], [[3], [7], [9]]):
            expected = made.golden.forward_batch(list(zip(step, caches)))
            for session in (rtl, timing):
                assert all(map(torch.equal, session.forward_batch(step), expected))
    finally:
        rtl.device.close()
    for (name, m), (_, p) in zip(rtl.runs, timing.runs, strict=True):
        assert abs(p.cycles / m.cycles - 1) <= 0.02, f"{name}: {p.cycles} predicted, {m.cycles} measured"
