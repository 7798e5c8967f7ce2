"""Formal proofs of the filter's gate, its ring and the page order; and that they notice broken designs."""

import pytest

from hw.flow.formal import ProofFailed, prove
from hw.storage.nfc import gate, ring
from tests.hw.mutants import mutant
from tests.hw.nfc import proofs


def test_no_marked_entry_is_lost_and_no_other_passes():
    prove(proofs.GateProof(), "gate_proof", depth=4)


@pytest.mark.slow
def test_pages_leave_in_order_whatever_order_they_come_in():
    prove(proofs.RingProof(), "ring_proof", depth=14, induction=False)


@pytest.mark.slow
def test_the_ring_proof_notices_room_given_twice(monkeypatch):
    broken = mutant(ring, "self.desc.p.last_row < self._depth", "self.desc.p.last_row < self._depth + 2")
    monkeypatch.setattr(proofs, "PageRing", broken.PageRing)
    with pytest.raises(ProofFailed):
        prove(proofs.RingProof(), "ring_proof", depth=14, induction=False)


def test_pages_reach_their_kernel_whole_and_in_order():
    prove(proofs.OrderProof(), "order_proof", depth=10, induction=False)


def test_the_gate_proof_notices_a_wrong_entry(monkeypatch):
    right = gate.entry_of
    monkeypatch.setattr(
        gate, "entry_of", lambda kind, wide, m_log2, beat: right(kind, wide, m_log2, beat) ^ wide
    )
    with pytest.raises(ProofFailed):
        prove(proofs.GateProof(), "gate_proof", depth=4)
