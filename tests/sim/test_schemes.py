"""Schemes: hand-computable limits, capacity errors that say what fits, and results that serialise."""

import json
import re

import pytest

from sim.api import bind, evaluate, simulate
from sim.core.graph import Graph
from sim.describe.base import CapacityError, ConfigError
from sim.describe.workload import Tuning, Workload
from sim.result import RunResult
from sim.timeline import perfetto

CASES = [
    ("reference", "opt-13b", "gpu-resident", 8),
    ("reference", "opt-13b", "flexgen-ssd", 64),
    ("reference", "opt-13b", "csd-dense", 64),
    ("instinfer", "opt-13b", "csd-dense", 64),
    ("reference", "opt-13b", "gpu-recompute", 64),
    ("reference", "opt-13b", "zero-inference", 16),
    ("reference", "opt-13b", "zero-inference", 32),
    ("reference", "opt-13b", "flexgen-dram", 32),
    ("reference", "opt-13b", "flexgen-gds", 16),
    ("reference", "opt-13b", "flexgen-sparq", 32),
    ("reference", "opt-13b", "csd-sparf", 64),
    ("instinfer", "opt-13b", "csd-sparf", 256),
    ("reference", "llama-2-7b", "fpga", 1),
    ("reference", "llama-2-7b", "fpga", 16),
    ("accllm", "llama-2-7b", "fpga", 1),
    ("reference", "llama-2-7b", "fpga+csd", 2),
    ("h100-server", "qwen2.5-14b", "csd-sparf", 32),
    ("h100-server", "llama-3.1-8b", "gpu-resident", 32),
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


@pytest.mark.parametrize("scheme", ["csd-dense", "csd-sparf", "flexgen-ssd"])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"csd.arbitration": "transfer-first"},
        {"csd.cache_read": True},
        {"csd_count": 4, "csd.retry_rate": 0.003},
    ],
)
def test_flow_stays_within_five_percent_of_page(calibration, scheme, batch, changes):
    work = Workload(batch=batch, input_tokens=1024, output_tokens=32)
    flow, page = (simulate("reference", "opt-13b", scheme, work, f, changes) for f in ("flow", "page"))
    assert flow.tokens_per_s == pytest.approx(page.tokens_per_s, rel=0.05)


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
    # The bytes of AccLLM's formats give 231 token/s at 460 GB/s and a 1,024-token cache; the preset derates HBM to 0.7.
    result = simulate("accllm", "llama-2-7b", "fpga", Workload(batch=1, input_tokens=1024, output_tokens=1))
    assert result.decode_tokens_per_s == pytest.approx(231 * 0.7, rel=0.02)


@pytest.mark.parametrize(
    ("scheme", "machine", "batch", "changes", "tier"),
    [
        ("gpu-resident", "reference", 64, {}, "GPU memory"),
        ("flexgen-dram", "reference", 128, {}, "host memory"),
        ("flexgen-ssd", "reference", 128, {"ssd.capacity_gb": 64.0}, "drives"),
        ("zero-inference", "reference", 256, {"ssd.capacity_gb": 64.0}, "host memory and swap"),
        ("csd-dense", "reference", 128, {"csd.capacity_gb": 64.0}, "computational drives"),
        ("csd-sparf", "reference", 256, {"csd.buffer_gb": 2.0}, "drive buffers"),
        ("fpga", "reference", 64, {}, "FPGA HBM"),
    ],
)
def test_every_tier_refuses_what_it_cannot_hold_and_the_batch_it_names_fits(
    calibration, scheme, machine, batch, changes, tier
):
    with pytest.raises(CapacityError, match=f"GB of {tier}, .* more than its") as caught:
        simulate(machine, "opt-13b", scheme, Workload(batch=batch), overrides=changes)
    fits = int(re.search(r"a batch of (\d+) would fit", str(caught.value))[1])
    bind(machine, "opt-13b", scheme, Workload(batch=fits), changes)
    with pytest.raises(CapacityError):
        bind(machine, "opt-13b", scheme, Workload(batch=fits + 1), changes)


def test_drives_behind_one_uplink_stop_scaling(calibration):
    rates = []
    for drives in (1, 4):
        changes = {"csd_count": drives, "drive_uplink": "pcie3-x4"}
        run = simulate("reference", "opt-13b", "csd-dense", Workload(batch=64), overrides=changes)
        rates.append(next(b for b in run.bandwidths if b["what"] == "to drives"))
    assert rates[0]["gb_per_s"] == rates[1]["gb_per_s"]
    assert rates[1]["binding"] == "drive uplink"


def test_sparf_at_full_density_reads_all_tokens(calibration):
    work = Workload(batch=16, sparsity=1.0)
    dense, sparse = (simulate("reference", "opt-13b", s, work) for s in ("csd-dense", "csd-sparf"))
    # All channels and all tokens: the exact step reads K and V once, the approximate step K once more.
    assert sparse.bytes_per_token["csd flash"] == pytest.approx(1.5 * dense.bytes_per_token["csd flash"])


def test_what_a_wider_window_keeps_in_hbm_the_drives_need_not_read(calibration):
    work = Workload(batch=1, input_tokens=3000, output_tokens=64)
    moved = []
    for window in (252, 1020, 2996):
        run = simulate("reference", "llama-2-7b", "fpga+csd", work, overrides={"fpga.window_tokens": window})
        moved.append(run.bytes_per_token["csd flash"])
    assert moved == sorted(moved, reverse=True)


def test_lockstep_recomputation_costs_a_prefill_per_token(calibration):
    work = Workload(batch=64)
    once, each = (
        simulate("reference", "opt-13b", "gpu-recompute", work, tuning=Tuning(recompute_quantum_tokens=q))
        for q in (1024, 1)
    )
    assert each.breakdown_s["recompute"] / once.breakdown_s["recompute"] == pytest.approx(1024, rel=0.01)


def test_attention_on_the_cpu_moves_no_cache_and_is_bound_by_dram(calibration):
    work = Workload(batch=32, input_tokens=1536, output_tokens=1)
    gpu, cpu = (
        simulate(
            "reference", "opt-13b", "flexgen-dram", work, tuning=Tuning(cpu_attention=on, kv_gpu_percent=0.0)
        )
        for on in (False, True)
    )
    assert cpu.bytes_per_token["pcie to gpu"] < 0.01 * gpu.bytes_per_token["pcie to gpu"]
    dram = next(b for b in cpu.bandwidths if b["what"] == "host dram")["gb_per_s"]
    # fp16 read, fp32 written and read again: five times the cache's bytes.
    assert cpu.breakdown_s["kv access"] == pytest.approx(5 * 32 * 1536 * 819_200 / dram / 1e9, rel=0.01)
    assert cpu.bottleneck == "cpu"


def test_reclaim_erases_whole_blocks_on_all_dies_at_once(calibration):
    from sim.describe.base import load
    from sim.describe.devices import Csd
    from sim.devices.flash import reclaim_s

    drive = load(Csd, "instcsd")
    stripe = drive.page_bytes * drive.pages_per_block * 8 * 8 * 2
    assert reclaim_s(drive, stripe) == pytest.approx(3e-3)
    assert reclaim_s(drive, stripe + 1) == pytest.approx(6e-3)


def test_a_block_of_parts_needs_less_memory_and_fetches_weights_once(calibration):
    work = Workload(batch=64, input_tokens=512, output_tokens=16)
    host_weights = {"weights_gpu_percent": 0.0, "kv_gpu_percent": 0.0}
    whole, parts = (
        simulate("reference", "opt-13b", "flexgen-ssd", work, tuning=Tuning(gpu_batches=n, **host_weights))
        for n in (1, 4)
    )
    used = [next(t for t in r.residency if t.tier == "GPU memory").used_gb for r in (whole, parts)]
    assert used[1] < 0.7 * used[0]
    assert parts.bytes_per_token["pcie to gpu"] == pytest.approx(whole.bytes_per_token["pcie to gpu"])


def test_host_memory_exceeded_collapses_throughput(calibration):
    fits, swaps = (simulate("reference", "opt-13b", "zero-inference", Workload(batch=b)) for b in (16, 32))
    assert not fits.policy["swapping"]
    assert swaps.policy["swapping"]
    assert swaps.bottleneck == "swap in"
    assert fits.tokens_per_s / swaps.tokens_per_s > 10


def test_cost_of_a_run_does_not_grow_with_context_or_drives(calibration):
    counts = []
    for context, drives in ((1024, 1), (100_000, 1), (1024, 8)):
        bound = bind(
            "h100-server",
            "llama-3.1-8b",
            "csd-dense",
            Workload(batch=8, input_tokens=context),
            {"csd_count": drives},
        )
        graph = Graph()
        bound.decode(graph, context, 5)
        counts.append(len(graph.tasks))
    assert len(set(counts)) == 1


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


def test_several_gpus_share_a_layer_and_pay_for_adding_up():
    def at(count, parallel="tensor"):
        changes = {"gpu_count": count, "gpu_parallel": parallel}
        work = Workload(batch=16, input_tokens=512, output_tokens=64)
        return simulate("a100-server", "llama-2-7b", "gpu-resident", work, overrides=changes)

    one, four, in_a_row = at(1), at(4), at(4, "layers")
    assert one.tokens_per_s < four.tokens_per_s < 4 * one.tokens_per_s
    assert one.time_to_first_token_s / 4 < four.time_to_first_token_s < one.time_to_first_token_s / 2
    assert in_a_row.tokens_per_s == pytest.approx(one.tokens_per_s)
    # Two ring all-reduces per layer move 2 (n - 1) / n of the hidden states each.
    moved = 4 * 3 / 4 * 4096 * 2 * 32
    assert four.bytes_per_token["gpu peers"] == pytest.approx(moved)


def test_heads_that_do_not_divide_over_gpus_are_refused():
    with pytest.raises(
        ConfigError, match=r"64 heads of llama-2-70b do not divide over 3 GPUs; 2 would, or gpu_"
    ):
        simulate("a100-server", "llama-2-70b", "gpu-resident", overrides={"gpu_count": 3})


def test_flexgen_places_whole_tensors():
    from sim.describe.model import load_model
    from sim.schemes.flexgen import Placement, whole_tensors

    model = load_model("opt-30b")
    asked = whole_tensors(model, Placement(0.2, 0.8))
    # Only the output projection's middle lies in the last fifth: a quarter of attention, a third of the weights.
    assert (asked.gpu, asked.disk) == (pytest.approx(1 / 12), 0.0)
    assert whole_tensors(model, Placement(0.0, 0.5)).disk == pytest.approx(0.5)
    assert whole_tensors(model, Placement(1.0, 0.0)).gpu == 1.0


def test_flexgen_percentages_move_what_they_place():
    work = Workload(batch=16, input_tokens=512, output_tokens=16)
    percents = {
        "weights_gpu_percent": 0.0, "weights_host_percent": 50.0, "kv_gpu_percent": 0.0, "kv_host_percent": 25.0,
        "activations_gpu_percent": 0.0, "activations_host_percent": 100.0,
    }  # fmt: skip
    run = simulate("reference", "opt-13b", "flexgen-ssd", work, tuning=Tuning(**percents))
    tiers = {t.tier: t.used_gb for t in run.residency}
    kv, weights = 16 * 528 * 819_200 / 1e9, 25.7
    assert tiers["drives"] == pytest.approx(0.5 * weights + 0.75 * kv, rel=0.02)
    assert tiers["host memory"] == pytest.approx(0.5 * weights + 0.25 * kv + 0.17, rel=0.02)
    hidden = 16 * 5120 * 2 * 40
    assert run.bytes_per_token["pcie from gpu"] * 16 == pytest.approx(hidden + 16 * 819_200)
    assert run.policy["kv_disk_percent"] == 75


@pytest.mark.parametrize(
    ("scheme", "tuning", "text"),
    [
        (
            "flexgen-ssd",
            {"kv_gpu_percent": 80.0, "kv_host_percent": 30.0},
            r"kv on GPU and host must .*got 80 \+ 30",
        ),
        ("flexgen-dram", {"kv_gpu_percent": 10.0, "kv_host_percent": 40.0}, "no disk for the 50% of kv"),
        ("flexgen-ssd", {"gpu_batches": 9}, "gpu_batches must be at most the batch of 8, got 9"),
    ],
)
def test_percentages_that_make_no_sense_are_refused(scheme, tuning, text):
    with pytest.raises(ConfigError, match=text):
        simulate("reference", "opt-13b", scheme, Workload(batch=8), tuning=Tuning(**tuning))


@pytest.mark.parametrize("scheme", ["csd-dense", "csd-sparf"])
def test_memory_of_a_run_does_not_grow_with_context_batch_or_drives(scheme):
    import tracemalloc

    roomy = {"csd.buffer_gb": 999.0, "csd.capacity_gb": 99_999.0, "csd_partition": "sequences"}

    def peak(batch, tokens, drives):
        work, changes = Workload(batch=batch, input_tokens=tokens), {**roomy, "csd_count": drives}
        simulate("reference", "llama-3.1-8b", scheme, work, overrides=changes)
        tracemalloc.start()
        simulate("reference", "llama-3.1-8b", scheme, work, overrides=changes)
        return tracemalloc.get_traced_memory()[1], tracemalloc.stop()

    peaks = [peak(*case)[0] for case in ((1, 1024, 1), (1, 100_000, 1), (512, 1024, 1), (1000, 1024, 1000))]
    assert max(peaks) < 1.2 * min(peaks)
    assert max(peaks) < 5e6
