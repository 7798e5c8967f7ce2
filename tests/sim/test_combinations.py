"""Any preset machine, model, scheme and workload either runs consistently or is refused in one sentence."""

import itertools
import math
import random

import pytest

from golden.spec import KVStrataError
from sim.api import FIDELITIES, scheme_names, simulate
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


CHANGES = {
    "csd_count": [1, 2, 4], "ssd_count": [1, 4], "gpu_count": [1, 2], "drive_uplink": ["pcie3-x4", "pcie4-x16"],
    "csd.cache_read": [False, True], "csd.dies_per_channel": [2, 4, 8, 16, 32], "csd.channels": [1, 4, 8, 16],
    "csd.retry_rate": [0.0, 0.003, 0.05], "csd.arbitration": ["pipelined", "transfer-first"],
    "csd.read_spread_us": [0.0, 6.0], "csd.program_us": [65.0, 700.0], "csd.planes_per_die": [1, 2, 4],
    "csd.buffer_gb": [64.0], "framework.disk_copy_threads": [1, 4, 16], "framework.gpu_batches": [1, 2],
    "framework.kv_gpu_percent": [0.0, 50.0], "framework.weights_gpu_percent": [0.0, 100.0],
    "framework.cpu_attention": [False, True], "framework.layer_overhead_us": [20.0, 630.0],
}  # fmt: skip
ON_FLASH = ("csd-dense", "csd-sparf", "flexgen-ssd", "flexgen-gds", "flexgen-sparq", "fpga+csd")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_bounds_hold_between_all_fidelities_for_any_drive(seed):
    rng, ran = random.Random(seed), 0
    while ran < 60:
        machine = rng.choice(["reference", "instinfer", "h100-server", "a100-server", "flexgen"])
        model = rng.choice(["opt-13b", "llama-2-7b", "llama-3.1-8b", "qwen2.5-7b", "opt-30b", "mixtral-8x7b"])
        scheme, sizes = rng.choice(ON_FLASH), ([1, 3, 8, 32, 64], [40, 300, 1024, 1800], [4, 64, 200])
        batch, prompt, output = (rng.choice(s) for s in sizes)
        work = Workload(
            batch=batch, input_tokens=prompt, output_tokens=output, sparsity=rng.choice([0.03, 0.125, 0.5])
        )
        changes = {k: rng.choice(v) for k, v in CHANGES.items() if rng.random() < 0.35}
        try:
            rates = [simulate(machine, model, scheme, work, f, changes).tokens_per_s for f in FIDELITIES]
        except KVStrataError:
            continue
        ran += 1
        bound, flow, page = rates
        assert 0.95 * page <= flow <= 1.12 * page, (machine, model, scheme, work, changes)
        assert bound >= flow * (1 - 1e-9), (machine, model, scheme, work, changes)
