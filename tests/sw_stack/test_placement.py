"""Attention in storage, and split between engine and drive: equal to its golden form bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from golden.config import DecoderConfig
from golden.exact_decoder import ExactDecoder
from golden.lambda_window import LambdaWindow
from golden.loaders import Checkpoint
from golden.ops import to_q16
from golden.spec import KVStrataError
from golden.spec.engine import SMALL, TINY, U280, EngineConfig
from golden.storage.attention import dense
from golden.storage.decoder import (
    EngineShare,
    HybridDecoder,
    Sparsity,
    Split,
    StorageDecoder,
    engine_partial,
    half,
    merge,
)
from sw_stack.compile.decoder import compile_shares, compile_split
from sw_stack.device.golden import GoldenDevice
from sw_stack.drive.driver import Driver, open_drive
from sw_stack.drive.flash import Geometry
from sw_stack.drive.shape import TaskShape
from sw_stack.pack.ring import KVRing
from sw_stack.runtime.machine import Setup, open_session
from sw_stack.runtime.placement import InStorage, Placement, WindowAndStorage
from sw_stack.runtime.session import SharedSession, SplitSession
from tests.sw_stack.machines import OPT, SHAPE, Machine, MakeMachine, random_checkpoint

MODEL = dataclasses.replace(SHAPE, heads=2, kv_heads=1, head_size=64)


def drive(machine: Machine, geometry: Geometry | None = None) -> Driver:
    driver, _ = open_drive(geometry or Geometry(4, 2, 16, 32))
    c = machine.checkpoint.config
    driver.config(0, TaskShape(c.layers, c.heads, c.kv_heads, c.head_size, 8, 512), 2)
    return driver


def split_session(machine: Machine, placement: Placement) -> SplitSession:
    programs = compile_split(machine.image.map, machine.image.norm_exponents)
    device = GoldenDevice(machine.image, seed=1)
    return SplitSession(device, programs, machine.golden.matrices["embed"].weight, placement=placement)


def prompt(n: int) -> list[int]:
    return np.random.default_rng(n).integers(0, MODEL.vocab, n).tolist()


@pytest.mark.parametrize("sparsity", [None, Sparsity(r=16, ratio=4, window=4)])
def test_attention_in_storage_equals_its_golden_form(machine: MakeMachine, sparsity: Sparsity | None) -> None:
    made = machine(MODEL, SMALL, context=128)
    session = split_session(made, InStorage(drive(made), sparsity))
    golden = StorageDecoder(made.checkpoint, "w4", sparsity)
    cache = golden.new_cache()
    for ids in (prompt(40), [3], [77]):
        assert torch.equal(session.forward(ids), golden.forward(ids, cache, last_only=True)[0])


def shared_session(machine: Machine, older: WindowAndStorage) -> SharedSession:
    programs = compile_shares(machine.image.map, machine.image.norm_exponents)
    device = GoldenDevice(machine.image, seed=1)
    return SharedSession(device, programs, machine.golden.matrices["embed"].weight, older=older)


@pytest.mark.parametrize(
    ("engine", "sparsity"), [(SMALL, None), (TINY, Sparsity(r=16, ratio=3, window=4))], ids=["dense", "sparf"]
)
def test_the_split_equals_its_golden_form_and_both_halves_matter(
    machine: MakeMachine, engine: EngineConfig, sparsity: Sparsity | None
) -> None:
    split = Split(sinks=2, window=21)
    made = machine(MODEL, engine, context=128, ring=KVRing.of_split(split))
    assert made.image.map.slots == 32
    older = WindowAndStorage(drive(made), split, sparsity)
    session = shared_session(made, older)
    golden = HybridDecoder(made.checkpoint, split, sparsity=sparsity)
    cache = golden.new_cache()
    ids = prompt(50)
    logits = session.forward(ids)
    assert torch.equal(logits, golden.forward(ids, cache, last_only=True)[0])
    assert torch.equal(session.forward([7]), golden.forward([7], cache)[0])
    assert older.driver.held(0, 0, 1) == 51 - 2
    window_alone = HybridDecoder(made.checkpoint, split)
    window_alone.split = dataclasses.replace(split, window=10)
    assert not torch.equal(window_alone.forward(ids, window_alone.new_cache(), last_only=True)[0], logits)


def test_a_window_that_holds_everything_is_the_engine(machine: MakeMachine) -> None:
    """Dense limit: nothing leaves the window, so the bits are those of dense attention on the engine."""
    made = machine(MODEL, SMALL, context=128)
    ids = prompt(30)
    split = HybridDecoder(made.checkpoint, Split(sinks=2, window=64))
    dense_engine = ExactDecoder(made.checkpoint, "w4", "kv4")
    expected = dense_engine.forward(ids, dense_engine.new_cache(), last_only=True)
    assert torch.equal(split.forward(ids, split.new_cache(), last_only=True), expected)


def test_merging_is_log_sum_exp() -> None:
    """Against float64 attention over the union, within what binary16 and 4-bit caches allow on each half."""
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(n, 2, 64, generator=rng, dtype=torch.float64) for n in (1, 80, 80))
    x = [to_q16(t) for t in (q[0], k, v)]
    near = torch.arange(60, 80)
    engine = engine_partial(x[0], x[1][near], x[2][near], 8)
    for h in range(2):
        old_k, old_v = half(x[1][:60, h]), half(x[2][:60, h])
        z = (k[:, h] @ q[0, h]) / 8
        truth = torch.softmax(z, 0) @ v[:, h]
        scores = torch.tensor(old_k.astype(float)) @ torch.tensor(half(x[0][h]).astype(float)) / 8 / np.log(2)
        top = int(torch.ceil(scores.max()))
        total = (torch.exp2(scores - top).sum() * 2.0**40).long()
        output = to_q16(dense(half(x[0][h])[None], old_k, old_v)[0].astype(float))
        mine = EngineShare(*(x[h, 0] for x in EngineShare.of(engine)))
        merged = merge(mine, output, torch.tensor(top), total).double() / 65536
        assert (merged - truth).abs().max() < 0.01
        nothing = merge(mine, output, torch.tensor(0), torch.tensor(0))
        assert torch.equal(nothing, mine.y)


@pytest.mark.parametrize(
    ("shape", "engine", "window"),
    [
        (SHAPE, SMALL, LambdaWindow(3, 32)),
        pytest.param(MODEL, TINY, LambdaWindow(0, 32, limit=7), marks=pytest.mark.slow),
        (SHAPE, U280, LambdaWindow(4, 32, limit=40)),
        pytest.param(MODEL, SMALL, LambdaWindow(2, 128), marks=pytest.mark.slow),
    ],
    ids=["sinks", "no-sinks", "u280", "wide"],
)
def test_a_lambda_window_equals_its_golden_form(
    machine: MakeMachine, shape: DecoderConfig, engine: EngineConfig, window: LambdaWindow
) -> None:
    """Before the ring is full, while the sinks are handed over, and after, with units in random order."""
    made = machine(shape, engine, context=96, ring=KVRing.of_lambda(window))
    golden = ExactDecoder(made.checkpoint, window=window)
    cache, session = golden.new_cache(), made.session(seed=2)
    for ids in (prompt(20), prompt(14), [5], prompt(40), [9]):
        assert torch.equal(session.forward(ids), golden.forward(ids, cache, last_only=True)[0])


OPT_MODEL = dataclasses.replace(OPT, heads=2, kv_heads=2, head_size=64)
WINDOW = LambdaWindow(4, 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "golden"),
    [
        (Setup(placement="csd", context=64), StorageDecoder),
        (
            Setup(placement="engine+csd", context=64, split=Split(2, 8)),
            partial(HybridDecoder, split=Split(2, 8)),
        ),
        (Setup(context=64, window=WINDOW), partial(ExactDecoder, window=WINDOW)),
    ],
    ids=["csd", "engine+csd", "lambda"],
)
def test_opt_in_every_placement(setup: Setup, golden: Callable[[Checkpoint], ExactDecoder]) -> None:
    model = dataclasses.replace(random_checkpoint(OPT_MODEL), sha256="opt in every placement")
    session, decoder = open_session(model, setup), golden(model)
    cache = decoder.new_cache()
    for ids in (prompt(40), [3], [77]):
        assert torch.equal(session.forward(ids), decoder.forward(ids, cache, last_only=True)[0])


def test_a_window_that_does_not_fill_its_ring_is_refused() -> None:
    with pytest.raises(
        KVStrataError, match="a multiple of 32 tokens and fills its ring; got a window of 20 in a ring of 32"
    ):
        KVRing.of_lambda(LambdaWindow(2, 20))


def test_a_split_without_a_window_is_refused() -> None:
    with pytest.raises(KVStrataError, match="a split has sinks >= 0 and a window >= 1; got 4 and 0"):
        Split(4, 0)
