"""Formal proofs of the deciding parts of argtopk, and the whole unit on every small problem."""

import itertools

import pytest
from amaranth import Module

from hw.flow.formal import ProofFailed, prove
from hw.storage.topk import lanes
from hw.storage.topk.unit import TopK
from tests.hw.topk import proofs
from tests.hw.topk.test_unit import check


def test_the_histogram_counts_every_digit_once():
    prove(proofs.HistogramProof(), "histogram_proof", depth=10, induction=False)


def test_ties_fill_up_to_need_in_index_order_and_no_further():
    prove(proofs.TieProof(), "tie_proof", depth=10, induction=False)


def test_the_tie_proof_notices_a_wrong_order(monkeypatch):
    class Backwards(lanes.TieBreak):
        """Counts the lanes of a row from the wrong end."""

        def elaborate(self, platform):
            m = Module()
            m.submodules.right = right = lanes.TieBreak(self._lanes, self._most)
            m.d.comb += [getattr(right, name).eq(getattr(self, name)) for name in ("start", "need", "valid")]
            m.d.comb += [right.above.eq(self.above[::-1]), right.equal.eq(self.equal[::-1])]
            m.d.comb += [self.mask.eq(right.mask[::-1]), self.done.eq(right.done)]
            return m

    monkeypatch.setattr(proofs, "TieBreak", Backwards)
    with pytest.raises(ProofFailed):
        prove(proofs.TieProof(), "tie_proof", depth=10, induction=False)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_every_small_problem_is_selected_exactly(step):
    """All lists of three and four keys of three values, every k and every window that matters; or one in nine."""
    dut = TopK(8, key_bits=2, lanes=2, in_lanes=1, digit_bits=1)
    cases = [
        (list(keys), k, window)
        for n in (3, 4)
        for keys in itertools.product((-2, -1, 0), repeat=n)
        for k in range(n + 1)
        for window in range(min(k, 2) + 1)
    ]
    assert len(cases) > 1200
    check(dut, cases[::step])
