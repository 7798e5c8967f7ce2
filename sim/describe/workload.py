"""What is asked of a machine: an offline batch of equal sequences (request arrivals: sim.serving)."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from sim.describe.base import Count, Described, Positive, Share, assumed

Percent = Annotated[float | None, Field(ge=0, le=100)]
"""Of what FlexGen places; the disk holds what GPU and host leave."""


class Workload(Described):
    """`batch` sequences of `input_tokens`, each continued by `output_tokens`."""

    kind: ClassVar[str] = "workload"
    name: str = "offline"
    batch: Count = assumed(64, "set by the user")
    input_tokens: Count = assumed(1024, "set by the user")
    output_tokens: Count = assumed(1024, "set by the user")
    sparsity: Share = assumed(0.125, "InstInfer: ratio 1/8", gt=0)

    @property
    def total_tokens(self) -> int:
        """Context length of a sequence at its end."""
        return self.input_tokens + self.output_tokens

    @property
    def generated_tokens(self) -> int:
        """Tokens generated over the whole batch."""
        return self.batch * self.output_tokens


class Tuning(Described):
    """Behaviour of a serving framework that schemes share; each default is a registered assumption."""

    kind: ClassVar[str] = "framework"
    name: str = "default"
    layer_overhead_us: Positive = assumed(630.0, "SIM-FRAMEWORK")
    recompute_quantum_tokens: Count = assumed(1024, "SIM-RECOMPUTE")
    host_weight_copies: Positive = assumed(2.0, "SIM-HOST-COPIES")
    cpu_attention: bool = assumed(False, "set by the user")
    cpu_attention_gflops: Positive | None = assumed(None, "the host's peak: attention streams at DRAM speed")
    gpu_batches: Count = assumed(1, "set by the user")
    weights_gpu_percent: Percent = assumed(None, "as much as fits")
    weights_host_percent: Percent = assumed(None, "as much as fits")
    kv_gpu_percent: Percent = assumed(None, "as much as fits")
    kv_host_percent: Percent = assumed(None, "the scheme's tier")
    activations_gpu_percent: Percent = assumed(None, "all")
    activations_host_percent: Percent = assumed(None, "the rest")
    disk_copy_threads: Count = assumed(1, "SIM-COPY-THREADS")
    cufile_us_per_io: Positive = assumed(45.0, "SIM-GDS")
    page_cache_us_per_io: Positive = assumed(25.0, "SIM-PAGE-CACHE")
