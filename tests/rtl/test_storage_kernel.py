"""The attention kernel as Verilog against golden: every bit, every cycle of the closed form."""

import numpy as np
import pytest

from golden.spec import KVStrataError
from golden.storage import attention
from hw.storage import timing
from sw_stack.rtl.attention import KernelConfig, run_head, run_heads

pytestmark = pytest.mark.rtl
ONE = KernelConfig(lanes=1)
GROUP = KernelConfig(lanes=3)


def head(rng, queries, tokens, head_size, spread=2.0):
    q = (rng.normal(size=(queries, head_size)) * spread).astype(np.float16)
    k, v = (rng.normal(size=(tokens, head_size)).astype(np.float16) for _ in range(2))
    return q, k, v


def assert_same(output, expected, what):
    got, want = output.view(np.uint16), expected.view(np.uint16)
    assert got.shape == want.shape
    wrong = np.argwhere(got != want)
    assert not len(wrong), (
        f"{what}: first of {len(wrong)} differing elements is {wrong[0]}: {got[tuple(wrong[0])]:#x}, "
        f"expected {want[tuple(wrong[0])]:#x}"
    )


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33, 100, 1000])
def test_head_is_exact_and_takes_the_predicted_cycles(head_size, tokens):
    q, k, v = head(np.random.default_rng(tokens), 1, tokens, head_size)
    run = run_head(q, k, v, ONE)
    assert_same(run.output, attention.dense(q, k, v), f"{tokens} tokens")
    assert run.cycles == timing.kernel_head(tokens, head_size, 1)


@pytest.mark.parametrize(("head_size", "queries"), [(64, 3), (128, 2)])
def test_queries_of_a_group_share_the_stream(head_size, queries):
    q, k, v = head(np.random.default_rng(9), queries, 150, head_size)
    run = run_head(q, k, v, GROUP)
    assert_same(run.output, attention.dense(q, k, v), f"{queries} queries")
    assert run.cycles == timing.kernel_head(150, head_size, queries)


@pytest.mark.parametrize("seed", range(3))
def test_pauses_and_neighbouring_heads_change_nothing(seed):
    rng = np.random.default_rng(seed)
    heads = [
        head(
            rng,
            int(rng.integers(1, 4)),
            int(rng.integers(1, 90)),
            int(rng.choice([64, 128])),
            rng.choice([0.1, 2, 30]),
        )
        for _ in range(6)
    ]
    outputs, _ = run_heads(heads, GROUP, seed=seed, pause_in=40 * (seed > 0), pause_out=60 * (seed > 1))
    for index, (output, (q, k, v)) in enumerate(zip(outputs, heads)):
        assert_same(output, attention.dense(q, k, v), f"head {index}")


def test_special_values_behave_as_the_golden_model_says():
    rng = np.random.default_rng(4)
    heads = []
    for case in range(8):
        q, k, v = head(rng, 2, 50, 64)
        if case == 0:
            k[20, 3] = np.nan
        elif case == 1:
            v[7, 5] = np.inf
        elif case == 2:
            q[1, 9] = np.inf
        elif case == 3:
            k[:, 0], q[:, 0] = -np.inf, 1
        elif case == 4:
            k[1:, 0], q[:, 0] = -np.inf, 1
        elif case == 5:
            q[0], k[3:20] = 0, 6e-8
        elif case == 6:
            q, k, v = q * np.float16(200), k * np.float16(500), np.clip(v, -1, 1) * np.float16(60000)
        else:
            v[::2], v[1::2] = 60000, -60000
        heads.append((q, k, v))
    outputs, _ = run_heads(heads, GROUP)
    for index, (output, (q, k, v)) in enumerate(zip(outputs, heads)):
        assert_same(output, attention.dense(q, k, v), f"case {index}")
    assert np.isnan(outputs[0]).all()
    assert np.isinf(outputs[1][:, 5]).all()
    assert np.isfinite(np.delete(outputs[1], 5, 1)).all()


def test_more_queries_than_lanes_are_refused():
    q, k, v = head(np.random.default_rng(0), 2, 16, 64)
    with pytest.raises(KVStrataError, match="serves 1 queries of a KV head at once, not 2"):
        run_head(q, k, v, ONE)
