"""Formal proof of the page passes; and that it notices broken designs."""

import inspect
import types

import pytest

from hw.flow.formal import ProofFailed, prove
from hw.storage import passes
from tests.hw.storage import proofs

pytestmark = pytest.mark.slow


def test_k_and_v_of_every_marked_page_are_asked_for_once_and_in_order():
    prove(proofs.TokenPassProof(), "token_pass_proof", depth=12, induction=False)


MUTATIONS = {
    "V before the next K": ('m.next = "key"\n', 'm.next = "value"\n'),
    "V takes the present page's marks": ("o.mask.eq(previous.mask)", "o.mask.eq(current.mask)"),
    "the last page has no V": ('m.next = "last value"', 'm.next = "take"'),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_proof_notices(name, monkeypatch):
    old, new = MUTATIONS[name]
    source = inspect.getsource(passes)
    assert old in source
    mutant = types.ModuleType(passes.__name__)
    exec(compile(source.replace(old, new), f"<{name}>", "exec"), mutant.__dict__)
    monkeypatch.setattr(proofs, "TokenPass", mutant.TokenPass)
    proof = proofs.TokenPassProof()
    with pytest.raises(ProofFailed):
        prove(proof, "token_pass_mutant", depth=12, induction=False)
