"""Request arrivals: limits that queueing theory gives, traces, and percentiles."""

import pytest

from sim.describe.base import CapacityError, ConfigError
from sim.describe.workload import Workload
from sim.policy import best_policy
from sim.serving import Request, percentile, poisson, serve, serve_on, summary, trace


class Fixed:
    """Constant step times: 10 ms per step for any batch, 1 ms prefill per token."""

    largest_batch = 4

    def prefill_s(self, tokens):
        return tokens * 1e-3

    def decode_s(self, batch, context):
        return 0.01


def test_a_lone_request_takes_prefill_and_its_steps():
    (only,) = serve(Fixed(), [Request(2.0, 100, 11)])
    assert only.first_s == pytest.approx(2.1)
    assert only.last_s == pytest.approx(2.1 + 10 * 0.01)


def test_a_fifth_request_waits_for_a_slot():
    served = serve(Fixed(), [Request(0.0, 10, 101)] * 5)
    firsts = sorted(s.first_s for s in served)
    assert firsts[3] == pytest.approx(0.04)
    assert firsts[4] > 1.0
    assert len(served) == 5


def test_every_request_gets_all_its_tokens_and_time_never_runs_backwards():
    requests = poisson(30.0, 200, 20, 40, seed=1)
    served = serve(Fixed(), requests)
    assert {id(s.request) for s in served} == {id(r) for r in requests}
    for s in served:
        assert s.first_s >= s.request.arrival_s + 0.02 - 1e-9
        assert s.last_s - s.first_s >= 39 * 0.01 - 1e-9


def test_latency_rises_with_load_and_throughput_saturates():
    results = [summary(serve(Fixed(), poisson(rate, 300, 10, 50, seed=2))) for rate in (0.5, 4.0, 40.0)]
    p99 = [r["latency_s.p99"] for r in results]
    assert p99 == sorted(p99)
    assert results[0]["tokens_per_s"] == pytest.approx(0.5 * 50, rel=0.15)
    assert results[2]["tokens_per_s"] <= 4 / 0.01


def test_poisson_gaps_have_the_asked_mean_and_are_seeded():
    requests = poisson(5.0, 4000, 1, 1, seed=3)
    assert requests[-1].arrival_s == pytest.approx(800, rel=0.05)
    assert requests == poisson(5.0, 4000, 1, 1, seed=3)
    with pytest.raises(ConfigError, match="rate > 0 and count >= 1, got rate 0 and count 3"):
        poisson(0, 3, 1, 1)


def test_a_scheme_serves_a_trace(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n1.0,256,32\n0.0,128,16\n")
    requests = trace(path)
    assert [r.arrival_s for r in requests] == [0.0, 1.0]
    row = serve_on("reference", "opt-13b", "gpu-resident", requests, most=8)
    assert row["requests"] == 2
    assert 0 < row["time_to_first_token_s.p50"] <= row["time_to_first_token_s.p99"] < row["latency_s.p99"]
    with pytest.raises(CapacityError, match="not even a batch of 1 fits"):
        serve_on("reference", "opt-175b", "gpu-resident", requests)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_s,input_tokens\n1,2\n", "line 2: needs numbers arrival_s, input_tokens, output_tokens"),
        ("arrival_s,input_tokens,output_tokens\n1,x,3\n", "line 2: needs numbers"),
        ("arrival_s,input_tokens,output_tokens\n1,0,3\n", "line 2: tokens must be >= 1"),
        ("arrival_s,input_tokens,output_tokens\n", "holds no request"),
    ],
)
def test_a_broken_trace_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        trace(path)


def test_nearest_rank_percentiles():
    assert [percentile([4, 1, 3, 2], p) for p in (0.25, 0.5, 0.75, 1.0)] == [1, 2, 3, 4]


def test_the_best_flexgen_policy_beats_the_default_one():
    from sim.api import simulate

    work = Workload(input_tokens=512, output_tokens=64)
    best = best_policy("instinfer", "opt-13b", batches=(4, 16), workload=work)
    for batch in (4, 16):
        assert (
            best.tokens_per_s
            >= simulate("instinfer", "opt-13b", "flexgen-ssd", work.replaced(batch=batch)).tokens_per_s
        )
    assert best.policy["weights_gpu_percent"] == 100
