"""The FTL against a model that is a list of tokens per head: nothing lost, doubled or read from the wrong place."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from golden.spec.storage import PageKind
from golden.storage.layout import place
from sw_stack.drive import shape as pages
from sw_stack.drive.errors import (
    AddressOutOfRange,
    ContextFull,
    DriveFull,
    InvalidField,
    NotConfigured,
    Unmapped,
    UnrecoveredRead,
    WriteFault,
)
from sw_stack.drive.flash import FlashArray, Geometry, PowerLost
from sw_stack.drive.ftl import Ftl, FtlOptions
from sw_stack.drive.journal import Span
from sw_stack.drive.recovery import mount
from sw_stack.drive.shape import TaskShape

PAGE_BYTES = 256
SHAPE = TaskShape(
    layers=2, q_heads=2, kv_heads=2, head_size=8, channels_per_page=4, max_tokens=128, page_bytes=PAGE_BYTES
)
GEOMETRY = Geometry(
    channels=2, dies_per_channel=2, blocks_per_die=12, pages_per_block=8, page_bytes=PAGE_BYTES
)


def drive(geometry: Geometry = GEOMETRY, dram_bytes: int = 1 << 20, **kwargs: object) -> Ftl:
    ftl = Ftl(FlashArray(geometry, **kwargs), FtlOptions(dram_bytes=dram_bytes))
    ftl.configure(0, SHAPE, SHAPE.address_map(4))
    return ftl


def tokens(rng: np.random.Generator, n: int) -> np.ndarray:
    """Random K and V of one layer, uint16[2, H, n, dh]: collisions are out of the question."""
    return rng.integers(0, 1 << 16, (2, SHAPE.kv_heads, n, SHAPE.head_size), dtype=np.uint16)


def held(ftl: Ftl, task: int, batch: int, layer: int) -> np.ndarray:
    """All of a layer read back through maps and group buffer, uint16[2, H, tokens, dh]."""
    full = int(ftl.sequences[task, batch].tokens[layer]) // SHAPE.tokens_per_page
    groups, every = np.arange(full), slice(None)
    k = pages.k_from_token_pages(SHAPE, ftl.read(task, batch, layer, PageKind.K_TOKEN, every, groups))
    v = pages.v_from_token_pages(SHAPE, ftl.read(task, batch, layer, PageKind.V_TOKEN, every, groups))
    tail = ftl.tail(task, batch, layer)
    return np.concatenate([np.stack([k, v])] + ([] if tail is None else [tail]), axis=2)


def channel_copy(ftl: Ftl, task: int, batch: int, layer: int) -> np.ndarray:
    """K of all complete segments from the channel pages, uint16[H, tokens, dh]."""
    whole = int(ftl.sequences[task, batch].tokens[layer]) // SHAPE.segment_tokens * SHAPE.channel_groups
    images = ftl.read(task, batch, layer, PageKind.K_CHANNEL, slice(None), np.arange(whole))
    return pages.k_from_channel_pages(SHAPE, images)


class FtlMachine(RuleBasedStateMachine):
    """Random commands, faults, power losses; the model is what the host believes the drive holds."""

    @initialize(
        seed=st.integers(0, 2**32 - 1),
        buffers=st.integers(1, 12),
        bad=st.sets(st.integers(0, 47), max_size=3),
    )
    def start(self, seed: int, buffers: int, bad: set[int]) -> None:
        self.rng = np.random.default_rng(seed)
        dram = buffers * SHAPE.buffer_bytes + 8 * SHAPE.map_bytes
        self.ftl = drive(dram_bytes=dram, bad_blocks=tuple(bad))
        self.ftl.configure(1, SHAPE, SHAPE.address_map(4))
        self.model: dict[tuple[int, int], list[np.ndarray]] = {}
        self.attempted: dict[tuple[int, int, int], np.ndarray] = {}

    def layers_of(self, key: tuple[int, int]) -> list[np.ndarray]:
        return self.model.setdefault(key, [tokens(self.rng, 0) for _ in range(SHAPE.layers)])

    @rule(task=st.integers(0, 1), batch=st.integers(0, 3), n=st.integers(1, 40))
    def append(self, task: int, batch: int, n: int) -> None:
        layers = self.layers_of((task, batch))
        for layer in range(SHAPE.layers):
            kv = tokens(self.rng, n)
            whole = np.concatenate([layers[layer], kv], axis=2)
            self.attempted[task, batch, layer] = whole
            try:
                count = self.ftl.append(task, batch, layer, n, kv)
            except DriveFull:
                return
            except ContextFull:
                assert layers[layer].shape[2] + n > SHAPE.max_tokens
                return
            layers[layer] = whole
            assert count == layers[layer].shape[2]

    @rule(task=st.integers(0, 1), batch=st.integers(0, 3), group=st.integers(0, 8))
    def cut(self, task: int, batch: int, group: int) -> None:
        self.ftl.reclaim(Span(task, batch, 1, group=group))
        if (task, batch) in self.model:
            keep = group * SHAPE.tokens_per_page
            self.model[task, batch] = [t[:, :, :keep] for t in self.model[task, batch]]

    @rule(task=st.integers(0, 1))
    def reclaim_task(self, task: int) -> None:
        self.ftl.reclaim(Span(task))
        self.ftl.configure(task, SHAPE, SHAPE.address_map(4))
        self.model = {k: v for k, v in self.model.items() if k[0] != task}

    @rule()
    def idle(self) -> None:
        self.ftl.idle()

    @rule(seed=st.integers(0, 2**32 - 1))
    def page_decays(self, seed: int) -> None:
        """One readable K page whose other copy is whole goes bad: it must be rebuilt."""
        rng = np.random.default_rng(seed)
        for (task, batch), layers in self.model.items():
            whole = layers[0].shape[2] // SHAPE.segment_tokens * SHAPE.channel_groups
            if whole and (task, batch) in self.ftl.sequences:
                view = PageKind.K_TOKEN if rng.integers(2) else PageKind.K_CHANNEL
                head, group = rng.integers(SHAPE.kv_heads), rng.integers(whole)
                ppn = self.ftl.sequences[task, batch].map[view, 0, head, group]
                room = self.ftl.allocator.capacity_pages(task)
                if ppn >= 0 and room and self.other_copy_whole(task, batch, view, int(head), int(group)):
                    self.ftl.flash.unreadable[ppn] = True
                    self.ftl.read(task, batch, 0, view, np.array([head]), np.array([group]))
                return

    def other_copy_whole(self, task: int, batch: int, view: PageKind, head: int, group: int) -> bool:
        other = PageKind.K_CHANNEL if view is PageKind.K_TOKEN else PageKind.K_TOKEN
        first = group // SHAPE.channel_groups * SHAPE.channel_groups
        table = self.ftl.sequences[task, batch].map[other, 0, head]
        ppns = table[first : first + SHAPE.channel_groups]
        return bool((ppns >= 0).all()) and not self.ftl.flash.unreadable[ppns].any()

    @rule(block=st.integers(0, 47), page=st.integers(0, 7))
    def program_will_fail(self, block: int, page: int) -> None:
        if len(self.ftl.flash.fail_program) < 2:
            self.ftl.flash.fail_program.add(block * 8 + page)

    @rule(budget=st.integers(0, 60), n=st.integers(1, 40), batch=st.integers(0, 3))
    def power_fails_during_append(self, budget: int, n: int, batch: int) -> None:
        before = {k: [t.copy() for t in v] for k, v in self.model.items()}
        self.ftl.flash.power_budget = budget
        with contextlib.suppress(PowerLost):
            self.append(0, batch, n)
        self.ftl.flash.power_budget = None
        self.ftl = mount(self.ftl.flash, self.ftl.options)
        self.adopt_survivors(before)

    def adopt_survivors(self, before: dict[tuple[int, int], list[np.ndarray]]) -> None:
        """Each sequence is a common prefix: no shorter than its whole groups, no other content."""
        for key in list(self.model):
            known = self.model[key]
            counts = (
                self.ftl.sequences[key].tokens if key in self.ftl.sequences else np.zeros(SHAPE.layers, int)
            )
            assert len(set(counts)) == 1
            survivors = int(counts[0])
            old = before.get(key, known)
            safe = min(t.shape[2] for t in old) // SHAPE.tokens_per_page * SHAPE.tokens_per_page
            assert survivors >= safe
            kept = []
            for layer, t in enumerate(known):
                now = held(self.ftl, *key, layer) if survivors else tokens(self.rng, 0)
                truth = t if survivors <= t.shape[2] else self.attempted[(*key, layer)]
                np.testing.assert_array_equal(now, truth[:, :, :survivors])
                kept.append(now)
            self.model[key] = kept

    @invariant()
    def everything_is_where_it_was_put(self) -> None:
        if not hasattr(self, "model"):
            return
        for key, layers in self.model.items():
            if key not in self.ftl.sequences:
                assert all(t.shape[2] == 0 for t in layers)
                continue
            for layer, expected in enumerate(layers):
                np.testing.assert_array_equal(held(self.ftl, *key, layer), expected)
                copy = channel_copy_if_mapped(self.ftl, key, layer)
                if copy is not None:
                    np.testing.assert_array_equal(copy, expected[0][:, : copy.shape[1]])

    @invariant()
    def no_page_serves_two_masters(self) -> None:
        if not hasattr(self, "model"):
            return
        mapped = [s.map[s.map >= 0] for s in self.ftl.sequences.values()]
        every = np.concatenate(mapped) if mapped else np.zeros(0, int)
        assert len(every) == len(np.unique(every))
        counts = np.bincount(every // GEOMETRY.pages_per_block, minlength=GEOMETRY.blocks)
        np.testing.assert_array_equal(self.ftl.allocator.valid, counts)

    @precondition(lambda self: hasattr(self, "ftl"))
    @invariant()
    def dram_stays_within_its_budget(self) -> None:
        assert self.ftl.dram_used_bytes <= self.ftl.options.dram_bytes


def channel_copy_if_mapped(ftl: Ftl, key: tuple[int, int], layer: int) -> np.ndarray | None:
    whole = int(ftl.sequences[key].tokens[layer]) // SHAPE.segment_tokens * SHAPE.channel_groups
    if not whole or (ftl.sequences[key].map[PageKind.K_CHANNEL, layer, :, :whole] < 0).any():
        return None
    return channel_copy(ftl, *key, layer)


def run_machine(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        FtlMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_random_commands_against_the_model() -> None:
    run_machine(examples=25, steps=25)


@pytest.mark.slow
def test_random_commands_against_the_model_for_long() -> None:
    run_machine(examples=400, steps=60)


# --- each guarantee by itself --------------------------------------------------------------------------
def test_pages_lie_where_the_golden_layout_says() -> None:
    shape = TaskShape(1, 4, 4, 128, 8, 1024)
    ftl = Ftl(FlashArray(Geometry(8, 4, 8, 64), store_data=False))
    ftl.configure(0, shape, shape.address_map(2))
    for batch in range(2):
        ftl.append(0, batch, 0, 1024, None)
    geometry, heads, groups = ftl.flash.geometry, np.arange(4)[:, None], np.arange(shape.groups)
    for batch in range(2):
        for view in PageKind:
            ppns = ftl.resolve(0, batch, 0, view, heads.ravel(), groups)
            die = ppns // (geometry.pages_per_block * geometry.blocks_per_die)
            channel, array = place(
                view, 4 * batch + heads, groups, groups=shape.channel_groups, channels=8, arrays=4
            )
            assert (die % 8 == channel).all()
            assert (die // 8 == array).all()


def test_a_full_drive_refuses_whole_appends_and_serves_the_rest() -> None:
    ftl, rng = drive(bad_blocks=tuple(range(0, 48, 3))), np.random.default_rng(1)
    kept: dict[tuple[int, int], np.ndarray] = {}

    def fill() -> None:
        for batch in range(4):
            for layer in [*range(SHAPE.layers)] * 4:
                kv = tokens(rng, 32)
                ftl.append(0, batch, layer, 32, kv)
                kept[batch, layer] = np.concatenate([kept.get((batch, layer), kv[:, :, :0]), kv], axis=2)

    with pytest.raises(DriveFull, match="no erased block left"):
        fill()
    for (batch, layer), expected in kept.items():
        np.testing.assert_array_equal(held(ftl, 0, batch, layer), expected)
    assert ftl.reclaim(Span(0, batch=0, batches=1)) > 0
    ftl.append(0, 3, 1, 16, tokens(rng, 16))


def test_reclaim_erases_only_when_idle_and_below_the_threshold_or_when_needed() -> None:
    ftl, rng = drive(), np.random.default_rng(2)
    ftl.append(0, 0, 0, 64, tokens(rng, 64))
    ftl.reclaim(Span(0))
    assert ftl.idle() == 0
    assert ftl.allocator.dead_blocks > 0
    ftl.options = FtlOptions(free_threshold=1.0)
    assert ftl.idle() > 0
    assert ftl.allocator.dead_blocks == 0


def test_wear_stays_level() -> None:
    ftl, rng = drive(), np.random.default_rng(3)
    for _ in range(60):
        for layer in range(2):
            ftl.append(0, 0, layer, 96, tokens(rng, 96))
        ftl.reclaim(Span(0))
        ftl.configure(0, SHAPE, SHAPE.address_map(4))
    counts = ftl.flash.erase_count
    assert counts.max() >= 5
    assert counts.max() - counts.min() <= 2


def test_a_lost_v_page_harms_its_sequence_alone() -> None:
    ftl, rng = drive(), np.random.default_rng(4)
    for batch in range(2):
        ftl.append(0, batch, 0, 32, kv := tokens(rng, 32))
    ftl.flash.unreadable[ftl.sequences[0, 0].map[PageKind.V_TOKEN, 0, 1, 0]] = True
    with pytest.raises(UnrecoveredRead, match="no second copy") as error:
        held(ftl, 0, 0, 0)
    assert error.value.detail == ftl.address(PageKind.V_TOKEN, 0, 0, 0, 1, 0)
    np.testing.assert_array_equal(held(ftl, 0, 1, 0), kv)


def test_a_lost_k_page_is_rebuilt_from_the_other_orientation() -> None:
    ftl, rng = drive(), np.random.default_rng(5)
    ftl.append(0, 0, 0, 32, kv := tokens(rng, 32))
    for view in (PageKind.K_TOKEN, PageKind.K_CHANNEL):
        ftl.flash.unreadable[ftl.sequences[0, 0].map[view, 0, 1, 1]] = True
    np.testing.assert_raises(UnrecoveredRead, held, ftl, 0, 0, 0)
    ftl.flash.unreadable[ftl.sequences[0, 0].map[PageKind.K_CHANNEL, 0, 1, 1]] = False
    np.testing.assert_array_equal(held(ftl, 0, 0, 0), kv)
    assert ftl.counters.rebuilt_pages == 1
    np.testing.assert_array_equal(held(ftl, 0, 0, 0), kv)
    assert ftl.counters.rebuilt_pages == 1


def test_power_loss_loses_only_what_dram_held() -> None:
    ftl, rng = drive(), np.random.default_rng(6)
    kept = [tokens(rng, 45) for _ in range(2)]
    for layer in range(2):
        ftl.append(0, 0, layer, 45, kept[layer])
    after = mount(ftl.flash)
    assert list(after.sequences[0, 0].tokens) == [32, 32]
    for layer in range(2):
        np.testing.assert_array_equal(held(after, 0, 0, layer), kept[layer][:, :, :32])
    ftl.spill_all()
    shut_down = mount(ftl.flash)
    assert list(shut_down.sequences[0, 0].tokens) == [45, 45]
    np.testing.assert_array_equal(held(shut_down, 0, 0, 1), kept[1])


def test_what_was_reclaimed_stays_reclaimed_over_a_power_loss() -> None:
    ftl, rng = drive(), np.random.default_rng(7)
    for layer in range(2):
        ftl.append(0, 0, layer, 64, tokens(rng, 64))
    ftl.reclaim(Span(0, batch=0, batches=1))
    assert (0, 0) not in mount(ftl.flash).sequences
    ftl.reclaim(Span(0))
    with pytest.raises(NotConfigured, match="must be configured"):
        mount(ftl.flash).append(0, 0, 0, 1, tokens(rng, 1))


def test_a_hole_is_no_loss_and_reads_as_unmapped() -> None:
    ftl, rng = drive(), np.random.default_rng(8)
    for layer in range(2):
        ftl.append(0, 0, layer, 64, kv := tokens(rng, 64))
    ftl.reclaim(Span(0, batches=1, group=1, groups=2))
    after = mount(ftl.flash)
    assert list(after.sequences[0, 0].tokens) == [64, 64]
    with pytest.raises(Unmapped, match="holds no data"):
        held(after, 0, 0, 1)
    last = after.read(0, 0, 1, PageKind.V_TOKEN, slice(None), np.array([3]))
    np.testing.assert_array_equal(pages.v_from_token_pages(SHAPE, last), kv[1][:, 48:])


def test_a_program_failure_moves_the_page_and_retires_the_block() -> None:
    ftl, rng = drive(), np.random.default_rng(9)
    ftl.append(0, 0, 0, 16, first := tokens(rng, 16))
    block = int(ftl.sequences[0, 0].map[0, 0, 0, 0]) // 8
    ftl.flash.fail_program = {block * 8 + 1, block * 8 + 2, block * 8 + 3}
    ftl.append(0, 0, 0, 112, rest := tokens(rng, 112))
    np.testing.assert_array_equal(held(ftl, 0, 0, 0), np.concatenate([first, rest], axis=2))
    ftl.reclaim(Span(0))
    assert ftl.flash.bad[block]
    assert ftl.allocator.counters.retired_blocks == 1


def test_a_die_that_cannot_program_is_a_write_fault_without_harm() -> None:
    ftl, rng = drive(), np.random.default_rng(10)
    ftl.append(0, 0, 0, 16, first := tokens(rng, 16))
    ftl.flash.fail_program = set(range(GEOMETRY.pages))
    with pytest.raises(WriteFault, match="could not be programmed"):
        ftl.append(0, 0, 0, 16, tokens(rng, 16))
    np.testing.assert_array_equal(held(ftl, 0, 0, 0), first)


def test_bad_configurations_are_refused_with_the_offending_dword() -> None:
    ftl = drive()
    with pytest.raises(InvalidField, match="all live tasks share one address map"):
        ftl.configure(1, SHAPE, SHAPE.address_map(8))
    with pytest.raises(InvalidField, match="bytes of drive DRAM; got 1000"):
        Ftl(FlashArray(GEOMETRY), FtlOptions(dram_bytes=1000)).configure(0, SHAPE, SHAPE.address_map(4))
    with pytest.raises(InvalidField, match="query heads are a multiple of KV heads; got 3 over 2"):
        TaskShape(1, 3, 2, 8, 4, 128, PAGE_BYTES)
    with pytest.raises(InvalidField, match="channels per page divide head size 8; got 3"):
        TaskShape(1, 2, 2, 8, 3, 128, PAGE_BYTES)
    with pytest.raises(AddressOutOfRange):
        ftl.append(0, 4, 0, 1, tokens(np.random.default_rng(0), 1))
    with pytest.raises(AddressOutOfRange):
        ftl.append(0, 0, 2, 1, tokens(np.random.default_rng(0), 1))


def test_channel_tail_needs_no_dram() -> None:
    """The sizing problem: OPT-13B, 64 sequences, m = 8 would need 6.7 GB for the channel tails alone."""
    shape = TaskShape(40, 40, 40, 128, 8, 2048)
    assert 64 * shape.layers * shape.channel_tail_bytes == 6_710_886_400
    assert 64 * shape.layers * shape.buffer_bytes == 838_860_800


@pytest.mark.slow
def test_millions_of_random_group_operations() -> None:
    """A soak by metadata: 3 million page operations; spare areas must agree with the maps at the end."""
    geometry = Geometry(8, 4, 64, 64, 4096)
    ftl = Ftl(FlashArray(geometry, store_data=False), FtlOptions(free_threshold=0.3))
    shape, rng = TaskShape(4, 8, 8, 128, 8, 4096), np.random.default_rng(11)
    for task in range(4):
        ftl.configure(task, shape, shape.address_map(4))
    while ftl.counters.group_operations < 3_000_000:
        task, batch = int(rng.integers(4)), int(rng.integers(4))
        try:
            n = int(rng.integers(1, 400))
            for layer in range(shape.layers):
                held_now = ftl.append(task, batch, layer, n, None)
            views = [ftl.resolve(task, batch, 0, v, slice(None), slice(0, held_now // 16)) for v in (0, 1)]
            assert (np.stack(views) >= 0).all()
        except (DriveFull, ContextFull):
            ftl.reclaim(Span(task))
            ftl.configure(task, shape, shape.address_map(4))
        ftl.idle()
    for (task, batch), sequence in ftl.sequences.items():
        view, layer, head, group = np.nonzero(sequence.map >= 0)
        word = sequence.map[view, layer, head, group]
        assert ftl.address_map is not None
        base = ftl.address(PageKind.K_TOKEN, task, batch, 0, 0, 0)
        bits = ftl.address_map
        expected = base | view << 30 | layer << (bits.head_bits + bits.group_bits) | head << bits.group_bits
        np.testing.assert_array_equal(ftl.flash.address[word], expected | group)
