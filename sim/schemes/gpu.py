"""KV in GPU memory: all of it where it fits, and what servers do where it does not."""

from __future__ import annotations

from typing import Any, ClassVar

from sim.core.graph import SETUP, Graph
from sim.result import Residency
from sim.schemes.base import GB, GpuScheme


class GpuResident(GpuScheme):
    """Everything in HBM, fused attention, prefill in slices of a few sequences."""

    name: ClassVar[str] = "gpu-resident"
    needs: ClassVar[tuple[str, ...]] = ("gpu",)

    def _fixed_bytes(self) -> float:
        """Weights and the activations of one prefill slice."""
        tokens = min(self.workload.batch * self.workload.input_tokens, self.slice_tokens)
        return self.model.weight_bytes + self.workspace_bytes(1, tokens)

    def residency(self) -> list[Residency]:
        w = self.workload
        used = self._fixed_bytes() + w.batch * w.total_tokens * self.model.kv_bytes_per_token
        return [Residency(tier="GPU memory", used_gb=used / GB, capacity_gb=self.gpu_capacity_gb)]

    def connect(self) -> None:
        self.connect_gpu(staged=False)

    def prefill(self, graph: Graph, layers: int) -> None:
        self.prefill_layers(graph, layers)

    def decode(self, graph: Graph, context: int, layers: int) -> None:
        before, after = self.layer_kernels(self.workload.batch)
        attention = self.attention_decode_s(context)
        done: list[int] = []
        dispatched: list[int] = []
        for layer in range(layers):
            graph.layer = layer
            # Launches run ahead of the device, so the framework only shows where kernels are shorter than it.
            dispatched.append(self.framework(graph, dispatched[-1:]))
            qkv = graph.work("qkv", before[1], "gpu", before[0], [dispatched[-1], *done[-1:]])
            scored = graph.work("attention", "kv access", "gpu", attention, [qkv])
            done.append(self.close_layer(graph, after, [scored]))
        graph.layer = SETUP
        self.finish(graph, done)


class GpuRecompute(GpuResident):
    """KV in HBM for as many sequences as fit; the others are preempted and their KV is recomputed when they resume.

    Every sequence advances by `recompute_quantum_tokens` before it is preempted: the whole output is what a continuous
    batching server does, 1 is a batch that advances in lockstep.
    """

    name: ClassVar[str] = "gpu-recompute"

    def _resident(self, context: int) -> int:
        """Sequences whose KV fits at `context` cached tokens, at least one."""
        room = self.gpu_capacity_gb * GB - self._fixed_bytes()
        fits = int(room // ((context + 1) * self.model.kv_bytes_per_token))
        return max(1, min(self.workload.batch, fits))

    def residency(self) -> list[Residency]:
        total = self.workload.total_tokens
        used = self._fixed_bytes() + self._resident(total) * total * self.model.kv_bytes_per_token
        return [Residency(tier="GPU memory", used_gb=used / GB, capacity_gb=self.gpu_capacity_gb)]

    def decode(self, graph: Graph, context: int, layers: int) -> None:
        batch, resident = self.workload.batch, self._resident(context)
        rounds = batch / resident
        before, after = self.layer_kernels(resident)
        attention = rounds * self.attention_of(resident, context)
        resumed = (batch - resident) / min(self.tuning.recompute_quantum_tokens, self.workload.output_tokens)
        recompute = resumed * self._recompute_layer_s(context)
        done: list[int] = []
        dispatched: list[int] = []
        for layer in range(layers):
            graph.layer = layer
            overhead = rounds * self.tuning.layer_overhead_us * 1e-6
            dispatched.append(graph.work("dispatch", "framework", "framework", overhead, dispatched[-1:]))
            ready = [dispatched[-1], *done[-1:]]
            linear = graph.work("linear layers", before[1], "gpu", rounds * (before[0] + after[0]), ready)
            scored = graph.work("attention", "kv access", "gpu", attention, [linear])
            redone = graph.work("recompute", "recompute", "gpu", recompute, [scored])
            done.append(self.close_layer(graph, (0.0, "transfer"), [redone], batch + resumed * context))
        graph.layer = SETUP
        self.finish(graph, done)

    def _recompute_layer_s(self, context: int) -> float:
        """Prefill of one preempted sequence in one layer."""
        before, after = self.layer_kernels(context)
        return before[0] + after[0] + self.attention_prefill_of(1, context)

    def policy(self) -> dict[str, Any]:
        return {
            "resident_sequences_at_end": self._resident(self.workload.total_tokens),
            "recompute_quantum_tokens": self.tuning.recompute_quantum_tokens,
        }
