"""Any preset machine, model, scheme and workload either runs consistently or is refused in one sentence."""

import itertools
import math
import random

import pytest

from golden.spec import KVStrataError
from sim.api import scheme_names, simulate
from sim.describe.base import listed
from sim.describe.workload import Workload

CASES = list(itertools.product(listed("machine"), listed("model"), scheme_names()))
random.Random(7).shuffle(CASES)


def drawn(number):
    rng = random.Random(number)
    return Workload(
        batch=rng.choice([1, 2, 7, 33, 128]),
        input_tokens=rng.choice([1, 16, 100, 1000]),
        output_tokens=rng.choice([1, 2, 9, 40, 300]),
        sparsity=rng.choice([0.05, 0.125, 0.5, 1.0]),
    )


@pytest.mark.parametrize("block", range(4))
def test_runs_are_consistent_and_refusals_are_sentences(calibration, block):
    ran, refusals = 0, []
    for number, (machine, model, scheme) in enumerate(CASES[block * 60 : block * 60 + 60]):
        work = drawn(1000 * block + number)
        try:
            flow = simulate(machine, model, scheme, work)
        except KVStrataError as error:
            refusals.append(str(error))
            continue
        ran += 1
        assert flow.tokens_per_s > 0
        assert math.isfinite(flow.tokens_per_s)
        assert sum(flow.breakdown.values()) == pytest.approx(1)
        assert all(0 <= share <= 1 for share in flow.utilisation.values())
        bound = simulate(machine, model, scheme, work, "analytic")
        assert bound.tokens_per_s >= flow.tokens_per_s * (1 - 1e-9)
    assert ran >= 10
    assert all("\n" not in text for text in refusals)
