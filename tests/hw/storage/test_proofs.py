"""Formal proofs of the page passes, the requester and the feeder; and that they notice broken designs."""

import pytest

from hw.flow.formal import ProofFailed, prove
from hw.storage import feeder, passes
from tests.hw.mutants import mutant
from tests.hw.storage import proofs

pytestmark = pytest.mark.slow


def break_block(monkeypatch, module, block, change):
    """The proofs get `block` of a `module` with one place changed."""
    monkeypatch.setattr(proofs, block, getattr(mutant(module, *change), block))


def assert_refused(proof, top, *, match=None, **options):
    with pytest.raises(ProofFailed, match=match):
        prove(proof, top, **options)


def test_k_and_v_of_every_marked_page_are_asked_for_once_and_in_order():
    prove(proofs.TokenPassProof(), "token_pass_proof", depth=12, induction=False)


MUTATIONS = {
    "V before the next K": ('m.next = "key"\n', 'm.next = "value"\n'),
    "V takes the present page's marks": ("o.mask.eq(previous.mask)", "o.mask.eq(current.mask)"),
    "the last page has no V": ('m.next = "last value"', 'm.next = "take"'),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_proof_notices(name, monkeypatch):
    break_block(monkeypatch, passes, "TokenPass", MUTATIONS[name])
    assert_refused(proofs.TokenPassProof(), "token_pass_mutant", depth=12, induction=False)


def test_every_channel_page_that_holds_a_marked_channel_is_wanted_once_and_in_order():
    prove(proofs.ChannelPassProof(), "channel_pass_proof", depth=4)


CHANNEL_MUTATIONS = {
    "a mark just beyond the widest group is not seen": ("rest[WIDEST + (1 << log2) :]", "rest[WIDEST + 8 :]"),
    "a mark near the group is not seen": ("last_group = ~(near | beyond)", "last_group = ~beyond"),
    "the next block's marks are not looked at": (
        "beyond.eq(marked_beyond)\n                with",
        "beyond.eq(0)\n                with",
    ),
}


@pytest.mark.parametrize("name", CHANNEL_MUTATIONS)
def test_the_channel_pass_proof_notices(name, monkeypatch):
    break_block(monkeypatch, passes, "ChannelPass", CHANNEL_MUTATIONS[name])
    assert_refused(proofs.ChannelPassProof(), "channel_pass_mutant", depth=4, match="the first 4 cycles")


def test_each_beat_of_a_page_says_what_it_is():
    prove(proofs.FeederPageProof(), "feeder_page_proof", depth=20)


FEEDER_MUTATIONS = {
    "a token ends a beat early": ("Mux(self.wide, 6, 2)", "Mux(self.wide, 6, 1)"),
    "the second half of a page begins no block": (
        "self.first.eq((page.kind != PageKind.K_TOKEN) | one_left)",
        "self.first.eq(page.kind != PageKind.K_TOKEN)",
    ),
    "a row's end is kept for the next page": (
        "            self.row_end.eq(0),\n            self.first.eq(1)",
        "            self.first.eq(1)",
    ),
}


@pytest.mark.parametrize("name", FEEDER_MUTATIONS)
def test_the_feeders_proof_notices(name, monkeypatch):
    break_block(monkeypatch, feeder, "Feeder", FEEDER_MUTATIONS[name])
    assert_refused(proofs.FeederPageProof(), "feeder_page_mutant", depth=20)


def test_a_wanted_page_is_asked_for_read_once_and_entered_in_its_ledger():
    """Minutes of solver time, which is why the bound is no higher."""
    prove(proofs.RequesterProof(), "requesterproof", depth=8, induction=False, timeout_s=1500)


REQUESTER_MUTATIONS = {
    "the group buffer is read from a flash channel": ("ppn.channel.eq(self._channels)", "ppn.channel.eq(0)"),
    "the last die is outside": ("page.die >= self.config.dies", "page.die + 1 >= self.config.dies"),
    "a page that is not mapped is read": (
        "self.read.valid.eq(able.any() & good)",
        "self.read.valid.eq(able.any())",
    ),
    "a page enters the other kernel's ledger": ("asked.kernel == kernel", "asked.kernel != kernel"),
}


@pytest.mark.parametrize("name", REQUESTER_MUTATIONS)
def test_the_requesters_proof_notices(name, monkeypatch):
    break_block(monkeypatch, passes, "Requester", REQUESTER_MUTATIONS[name])
    assert_refused(proofs.RequesterProof(), "requester_mutant", depth=8, induction=False)
