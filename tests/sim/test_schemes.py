"""Schemes: hand-computable limits, capacity errors that say what fits, and results that serialise."""

import json

import pytest

from sim.api import bind, evaluate, simulate
from sim.describe.base import CapacityError, ConfigError
from sim.describe.workload import Workload
from sim.result import RunResult
from sim.timeline import perfetto

CASES = [
    ("reference", "opt-13b", "gpu-resident", 8),
    ("reference", "opt-13b", "flexgen-ssd", 64),
    ("reference", "opt-13b", "csd-dense", 64),
    ("instinfer", "opt-13b", "csd-dense", 64),
    ("reference", "llama-2-7b", "fpga", 1),
]


@pytest.mark.parametrize(("machine", "model", "scheme", "batch"), CASES)
def test_results_are_consistent_and_serialise(calibration, machine, model, scheme, batch):
    result = simulate(machine, model, scheme, Workload(batch=batch))
    assert sum(result.breakdown.values()) == pytest.approx(1)
    assert sum(result.breakdown_s.values()) == pytest.approx(result.time_per_output_token_s)
    assert result.decode_tokens_per_s == pytest.approx(batch / result.time_per_output_token_s)
    assert 0 < result.utilisation[result.bottleneck] <= 1
    assert all(t.used_gb <= t.capacity_gb for t in result.residency)
    assert result.assumptions
    assert all(row["source"] for row in result.assumptions)
    assert RunResult.model_validate(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize(("machine", "model", "scheme", "batch"), CASES)
def test_sampling_layers_and_steps_stays_within_one_percent_of_all(
    calibration, machine, model, scheme, batch
):
    bound = bind(machine, model, scheme, Workload(batch=batch, input_tokens=512, output_tokens=64))
    full = evaluate(bound, every_step=True, all_layers=True)
    assert evaluate(bound).tokens_per_s == pytest.approx(full.tokens_per_s, rel=0.01)


@pytest.mark.parametrize(("machine", "model", "scheme", "batch"), CASES)
def test_analytic_is_never_slower_than_flow(calibration, machine, model, scheme, batch):
    work = Workload(batch=batch)
    bound, flow = (simulate(machine, model, scheme, work, fidelity) for fidelity in ("analytic", "flow"))
    assert bound.tokens_per_s >= flow.tokens_per_s * (1 - 1e-9)
    assert bound.decode_tokens_per_s >= flow.decode_tokens_per_s * (1 - 1e-9)


def test_csd_attention_is_the_flash_rate_when_the_unit_streams(calibration):
    # 64 sequences, 1,536 cached tokens: 40 layers x 64 x 1,536 x 20,480 B at the array-bound rate of the drive.
    result = simulate(
        "reference", "opt-13b", "csd-dense", Workload(batch=64, input_tokens=1536, output_tokens=1)
    )
    flash = next(b for b in result.bandwidths if b["what"] == "csd flash")
    assert flash["binding"] == "flash array"
    moved = 40 * 64 * 1536 * 20480
    assert result.bytes_per_token["csd flash"] * 64 == pytest.approx(moved)
    assert result.breakdown_s["kv access"] == pytest.approx(moved / (flash["gb_per_s"] * 1e9), rel=0.01)


def test_two_drives_halve_the_flash_time(calibration):
    one, two = (
        simulate("reference", "opt-13b", "csd-dense", Workload(batch=64), overrides={"csd_count": n})
        for n in (1, 2)
    )
    assert one.breakdown_s["kv access"] / two.breakdown_s["kv access"] == pytest.approx(2, rel=0.02)


def test_fpga_decode_meets_the_published_traffic_bound(calibration):
    # reference/accllm.md section 5: 231 token/s at 460 GB/s and a 1,024-token cache; the preset derates HBM to 0.7.
    result = simulate("accllm", "llama-2-7b", "fpga", Workload(batch=1, input_tokens=1024, output_tokens=1))
    assert result.decode_tokens_per_s == pytest.approx(231 * 0.7, rel=0.02)


def test_capacity_errors_say_limit_excess_and_what_fits(calibration):
    with pytest.raises(
        CapacityError,
        match=r"opt-13b at batch 64 needs .* GB of GPU memory, .* more .*a batch of \d+ would fit",
    ):
        simulate("reference", "opt-13b", "gpu-resident", Workload(batch=64))
    with pytest.raises(CapacityError, match="not even a batch of 1 fits"):
        simulate("reference", "opt-175b", "gpu-resident", Workload(batch=1))
    fits = 13
    simulate("reference", "opt-13b", "gpu-resident", Workload(batch=fits))
    with pytest.raises(CapacityError, match=f"a batch of {fits} would fit"):
        simulate("reference", "opt-13b", "gpu-resident", Workload(batch=fits + 1))


@pytest.mark.parametrize(
    ("machine", "scheme", "overrides", "message"),
    [
        ("u280", "csd-dense", {}, "scheme csd-dense needs a gpu, and machine u280 has none"),
        ("a100-server", "fpga", {}, "scheme fpga needs a fpga, and machine a100-server has none"),
        ("reference", "csd-dense", {"p2p": False}, "peer to peer, and machine reference has p2p = false"),
        (
            "reference",
            "csd-dense",
            {"csd_count": 3},
            "40 heads of opt-13b do not divide over 3 drives; 2 would",
        ),
        ("reference", "csd-dens", {}, r"unknown scheme 'csd-dens' \(did you mean csd-dense\?\)"),
    ],
)
def test_what_a_machine_cannot_host_is_one_sentence(calibration, machine, scheme, overrides, message):
    with pytest.raises(ConfigError, match=message):
        simulate(machine, "opt-13b", scheme, Workload(batch=4), overrides=overrides)


def test_positions_and_fidelity_are_checked(calibration):
    with pytest.raises(ConfigError, match="2000 . 1024 tokens exceed the 2048 positions of opt-13b by 976"):
        simulate("reference", "opt-13b", "csd-dense", Workload(batch=1, input_tokens=2000))
    with pytest.raises(ConfigError, match="fidelity must be one of analytic, flow, page, got 'flw'"):
        simulate("reference", "opt-13b", "csd-dense", fidelity="flw")


def test_perfetto_events_are_complete_and_inside_their_tracks(calibration):
    trace = perfetto(simulate("reference", "opt-13b", "csd-dense", Workload(batch=64)))
    events = json.loads(json.dumps(trace))["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert spans
    assert {e["ph"] for e in events} == {"M", "X", "b", "e"}
    assert all(e["dur"] >= 0 for e in spans)
    for track in {(e["pid"], e["tid"]) for e in spans}:
        times = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if (e["pid"], e["tid"]) == track)
        assert all(a[1] <= b[0] + 1e-3 for a, b in zip(times, times[1:]))


def test_the_same_run_gives_the_same_bytes(calibration):
    first, second = (json.dumps(simulate("reference", "opt-13b", "csd-dense").to_dict()) for _ in range(2))
    assert first == second
