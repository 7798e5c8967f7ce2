"""Operand fetch proved over every pattern of grants, stalls and resets within the bound."""

import pytest

from hw.engine.sfu import fetch
from hw.flow.formal import ProofFailed, prove
from tests.hw.formal.sfu_proofs import FetchProof


def test_every_request_gets_its_own_words():
    prove(FetchProof(), "sfu_fetch", depth=7, induction=False)


@pytest.mark.slow
def test_every_request_gets_its_own_words_at_every_queue_position():
    """The queues' pointers go round once: twice the depth, and the latency."""
    prove(FetchProof(), "sfu_fetch", depth=2 * fetch.PREFETCH + 3, induction=False, timeout_s=1800)


def test_the_proof_sees_a_port_that_forgets_its_grant(monkeypatch):
    """A fetch that asks a port twice for one request pairs the words wrongly: the proof must fail."""
    monkeypatch.setattr(fetch, "remembered", lambda granted, grant, complete: grant & ~complete)
    with pytest.raises(ProofFailed):
        prove(FetchProof(), "sfu_fetch_broken", depth=7, induction=False)
