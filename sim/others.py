"""Published results of systems that the model was not made for: none of them set a parameter.

They tell how far the model holds beyond the two papers of `sim.reproduce`; their errors are reported on their own. A
figure that a preset carries as a rating (a drive's sequential rate, its rated reads per second) is no test and is left
out. A row is "predicted" where its published value was checked, "unverified" where it was not.
"""

from __future__ import annotations

from functools import lru_cache

from sim.api import simulate
from sim.describe.base import load
from sim.describe.devices import Fpga, Link, Ssd
from sim.describe.workload import Tuning, Workload
from sim.devices import hbm
from sim.devices.drive import random_reads
from sim.reproduce import Row

UNVERIFIED = "unverified"
FLEXGEN = "FlexGen, T4 (arXiv 2303.06865, Table 2)"
PERCENTS = (
    "weights_gpu_percent", "weights_host_percent", "kv_gpu_percent", "kv_host_percent", "activations_gpu_percent",
    "activations_host_percent",
)  # fmt: skip


@lru_cache(maxsize=16)
def _flexgen(model: str, part: int, parts: int, percents: tuple[float, ...], prompt: int) -> float:
    """Tokens/s of its published policy: sequences per part, parts of a block, and the six percentages."""
    tuning = load(Tuning, "flexgen").replaced(gpu_batches=parts, **dict(zip(PERCENTS, percents)))
    work = Workload(batch=part * parts, input_tokens=prompt, output_tokens=32)
    return simulate("flexgen", model, "flexgen-ssd", work, tuning=tuning).tokens_per_s


def _one_read_kiops(drive: str) -> float:
    """Random reads of 4 KiB one after the other."""
    ssd = load(Ssd, drive)
    run = random_reads(ssd, load(Link, ssd.link), 4, depth=1, reads=2_000)
    return 2.0 / run.seconds


def _edgellm_kept_clock() -> float:
    """EdgeLLM with the clock that its own text gives its matrix engine."""
    work, clock = Workload(batch=1, input_tokens=512, output_tokens=512), {"fpga.clock_mhz": 280.0}
    return simulate("edgellm", "chatglm2-6b", "fpga", work, overrides=clock).decode_tokens_per_s


def _flightllm_hbm_used() -> float:
    """Bytes per second over the board's peak."""
    run = simulate("flightllm-u280", "llama-2-7b", "fpga", Workload(batch=1, input_tokens=512))
    return 100 * run.bytes_per_token["hbm"] * run.decode_tokens_per_s / 460e9


def rows() -> list[Row]:
    """Every such figure."""
    on_gpu, mixed, on_disk = (100, 0, 100, 0, 100, 0), (20, 80, 0, 100, 0, 100), (0, 50, 0, 0, 0, 100)
    return [
        Row(FLEXGEN, "OPT-6.7B, prompt 512", 25.26, "token/s", lambda: _flexgen("opt-6.7b", 2, 1, on_gpu, 512),
            UNVERIFIED),
        Row(FLEXGEN, "OPT-30B, prompt 512", 7.32, "token/s", lambda: _flexgen("opt-30b", 48, 3, mixed, 512), UNVERIFIED,
            note="copies of the prompt's cache to host memory are taken to hide behind compute"),
        Row(FLEXGEN, "OPT-175B, prompt 512", 0.69, "token/s", lambda: _flexgen("opt-175b", 32, 8, on_disk, 512),
            UNVERIFIED),
        Row(FLEXGEN, "OPT-6.7B, prompt 1,024", 13.72, "token/s", lambda: _flexgen("opt-6.7b", 1, 1, on_gpu, 1024),
            UNVERIFIED),
        Row(FLEXGEN, "OPT-175B, prompt 1,024", 0.35, "token/s", lambda: _flexgen("opt-175b", 12, 12, on_disk, 1024),
            UNVERIFIED),
        Row("Samsung 970 PRO data sheet", "random reads of 4 KiB, one at a time", 15.0, "kIOPS",
            lambda: _one_read_kiops("970-pro-1tb"), UNVERIFIED),
        Row("Samsung 980 Pro data sheet", "random reads of 4 KiB, one at a time", 22.0, "kIOPS",
            lambda: _one_read_kiops("980-pro-2tb"), UNVERIFIED, note="a polling host's; the model's takes 8 us per IO"),
        Row("EdgeLLM, its own text", "GLM-6B on VCU128, 280 MHz", 90.0, "token/s", _edgellm_kept_clock,
            note="as ChatGLM2-6B; the row of the comparison is at 250 MHz"),
        Row("FlightLLM (arXiv 2401.03868)", "HBM bandwidth used in decode, U280", 65.9, "%", _flightllm_hbm_used),
        Row("DRAM simulators", "HBM, random 64 B, middle of a quarter to 60% of peak", 42.5, "%",
            lambda: 100 * hbm.measure(load(Fpga, "u280"), 64, 16, sequential=False) / 460,
            note="16 reads outstanding; 23% with 8, 50% with 32 or more"),
        Row("Alveo U280, measured best", "HBM, sequential", 425.0, "GB/s",
            lambda: hbm.measure(load(Fpga, "u280"), 1024, 32, sequential=True, requests=5_000)),
    ]  # fmt: skip
