"""What every scheme answers: what it needs, where bytes live, and the task graphs of prefill and of a decode step.

Categories of time are the papers': "kv access", "weight access", "compute", "csd compute", "transfer", "framework";
"recompute" is KV computed again after a preemption, "vector work" what an FPGA engine does besides products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from sim.core.graph import SETUP, Graph
from sim.describe.base import CapacityError, ConfigError
from sim.describe.devices import Gpu, Link
from sim.describe.machine import Machine
from sim.describe.model import FP16_BYTES, Model
from sim.describe.workload import Tuning, Workload
from sim.devices import gpu as kernels
from sim.devices import gpu_attention
from sim.devices.limits import Bandwidth
from sim.result import Residency

GB = 1e9
PEER_HOP_US = 3.0
"""One step of a ring between GPUs: kernel and link latency (SIM-GPU-PEERS)."""


class Scheme(ABC):
    """One scheme bound to a machine, a model and a workload. Constructing it checks that it can run at all."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]

    def __init__(self, machine: Machine, model: Model, workload: Workload, tuning: Tuning) -> None:
        self.machine, self.model, self.workload, self.tuning = machine, model, workload, tuning
        for part in self.needs:
            machine.part(part, self.name)
        if workload.total_tokens > model.max_positions:
            raise ConfigError(
                f"scheme {self.name}: {workload.input_tokens} + {workload.output_tokens} tokens exceed the "
                f"{model.max_positions} positions of {model.name} by {workload.total_tokens - model.max_positions}"
            )
        self.place()
        self.pipes: dict[str, float] = {}
        self.bandwidths: list[Bandwidth] = []
        self.connect()

    def plan(self) -> list[Residency]:
        """Decide the placement (percentages) for the current workload; returns what it puts on each tier."""
        return self.residency()

    def place(self) -> None:
        """Plan, and raise CapacityError where a tier does not hold what the plan puts there."""
        for tier in self.plan():
            if tier.used_gb > tier.capacity_gb:
                raise CapacityError(self._excess(tier))

    @abstractmethod
    def residency(self) -> list[Residency]:
        """Peak bytes per tier against capacity."""

    @abstractmethod
    def connect(self) -> None:
        """Fill `pipes` (bytes/s by name) and `bandwidths` (why each is what it is)."""

    @abstractmethod
    def prefill(self, graph: Graph, layers: int) -> None:
        """Add the prefill of the whole batch over `layers` decoder layers."""

    @abstractmethod
    def decode(self, graph: Graph, context: int, layers: int) -> None:
        """Add one decode step of the whole batch with `context` tokens cached."""

    def page_seconds(self, pipe: str, size_bytes: float) -> float | None:
        """Seconds that a transfer's flash pages take on the page engine; None where `pipe` is not flash.

        Replaces the task's fixed latency: the engine starts from an idle drive.
        """
        return None

    def policy(self) -> dict[str, Any]:
        """Placement and schedule in the scheme's own terms."""
        return {}

    def numerics(self) -> str:
        """weights/activations/kv/policy as docs/accuracy.md names them; fp16 counts as its reference, float."""
        return "float/float/float/dense"

    def provenance(self) -> list[dict[str, Any]]:
        """Rows about values that belong to no description, such as measured cycles."""
        return []

    def flash_written_per_token(self) -> float:
        """Bytes programmed to flash per generated token, prefill writes amortised over the output."""
        return 0.0

    def _pipe(self, name: str, bandwidth: Bandwidth) -> None:
        self.pipes[name] = bandwidth.bytes_per_s
        self.bandwidths.append(bandwidth)

    def _excess(self, tier: Residency) -> str:
        over, asked = tier.used_gb - tier.capacity_gb, self.workload.batch
        fits = self._largest_batch()
        remedy = f"a batch of {fits} would fit" if fits else "not even a batch of 1 fits"
        return (
            f"scheme {self.name}: {self.model.name} at batch {asked} needs {tier.used_gb:.1f} GB of "
            f"{tier.tier}, {over:.1f} GB more than its {tier.capacity_gb:.1f} GB; {remedy}"
        )

    def _largest_batch(self) -> int:
        """Largest batch that fits every tier with a plan of its own, by bisection."""
        original, low, high = self.workload, 0, self.workload.batch
        while high - low > 1:
            middle = (low + high) // 2
            self.workload = original.model_copy(update={"batch": middle})
            fits = all(t.used_gb <= t.capacity_gb for t in self.plan())
            low, high = (middle, high) if fits else (low, middle)
        self.workload = original
        return low


def link_bandwidth(what: str, *links: Link | None) -> Bandwidth:
    """Payload rate of links in series."""
    return Bandwidth(
        what, {f"{link.name} #{i}": link.payload_gb_per_s for i, link in enumerate(links) if link}
    )


class GpuScheme(Scheme):
    """Schemes whose linear layers run on the GPU. Kernel and framework time are separate tasks."""

    weights_host_share = 0.0
    slice_tokens: ClassVar[int] = 16384
    """Tokens whose prefill activations are alive at once where prefill is sliced (SIM-GPU-SLICE)."""
    eager_scores: ClassVar[bool] = False
    """Whether prefill materialises batch x heads x S x S scores, twice, as eager frameworks do."""

    @property
    def gpu(self) -> Gpu:
        """The GPU."""
        return self.machine.part("gpu", self.name)

    @property
    def ways(self) -> int:
        """GPUs that share every layer (tensor parallel); 1 where layers lie on one GPU after the other."""
        return self.machine.gpu_count if self.machine.gpu_parallel == "tensor" else 1

    def place(self) -> None:
        if self.model.heads % self.ways:
            fits = max(n for n in range(1, self.ways) if self.model.heads % n == 0)
            raise ConfigError(
                f"scheme {self.name}: {self.model.heads} heads of {self.model.name} do not divide over {self.ways} "
                f'GPUs; {fits} would, or gpu_parallel = "layers"'
            )
        super().place()

    def connect_gpu(self, staged: bool = True) -> None:
        """Pipes of the GPUs' host links (every GPU has its own) and of the exchange between GPUs."""
        links = link_bandwidth("host links", self.machine.gpu_link).limits if staged else {}
        for way in ("pcie to gpu", "pcie from gpu") if staged else ():
            self._pipe(way, Bandwidth(way, {k: v * self.ways for k, v in links.items()}))
        if self.ways > 1:
            self._pipe("gpu peers", self._peer_bandwidth())

    def _peer_bandwidth(self) -> Bandwidth:
        """Of one GPU towards its peers, per direction: their own links where they have some, else the host's."""
        if self.gpu.peer_gb_per_s:
            return Bandwidth("gpu peers", {"GPU links": self.gpu.peer_gb_per_s})
        return link_bandwidth("gpu peers", self.machine.part("gpu_link", self.name))

    @property
    def gpu_capacity_gb(self) -> float:
        """Memory of all GPUs that a scheme may use."""
        return self.machine.gpu_count * (self.gpu.memory_gb - self.gpu.reserved_gb)

    def workspace_bytes(self, batch: int, tokens: int) -> float:
        """Activations alive at once in a prefill layer of `batch` sequences of `tokens`."""
        m = self.model
        # The FFN's hidden layer and what attention holds are not alive together.
        qkv = (m.heads + 2 * m.kv_heads) * m.head_size
        scores = 2 * m.heads * tokens if self.eager_scores else 0
        wide = max(m.ffn * (2 if m.gated else 1), qkv + scores)
        return float(batch * tokens * (2 * m.hidden + wide) * FP16_BYTES)

    def layer_kernels(self, tokens: int) -> tuple[tuple[float, str], tuple[float, str]]:
        """(seconds, category) of the kernels before attention (norm, qkv) and after it (o, norm, FFN)."""
        m, gpu, ways = self.model, self.gpu, self.ways
        qkv = (m.heads + 2 * m.kv_heads) * m.head_size / ways
        active = m.active_ffn_weights(tokens) / m.ffn_weights
        routed = tokens * m.experts_per_token / active
        wide = m.ffn / ways
        up = wide * (2 if m.gated else 1)
        norm = kernels.elementwise(gpu, 3 * tokens * m.hidden * FP16_BYTES)
        before = [norm, kernels.gemm(gpu, tokens, m.hidden, qkv)]
        after = [norm, kernels.gemm(gpu, tokens, m.heads * m.head_size / ways, m.hidden)]
        ffn = [kernels.gemm(gpu, routed, m.hidden, up), kernels.gemm(gpu, routed, wide, m.hidden)]
        ffn.append(kernels.elementwise(gpu, routed * (up + wide) * FP16_BYTES))
        rest = _total(after)[0] + active * _total(ffn)[0]
        return _total(before), (rest, _total(ffn)[1])

    def head_kernel(self) -> tuple[float, str]:
        """(seconds, category) of the final norm and the LM head for one token of each sequence."""
        m = self.model
        return _total([kernels.gemm(self.gpu, self.workload.batch, m.hidden, m.vocabulary / self.ways)])

    def attention_decode_s(self, context: float) -> float:
        """Seconds of one layer's attention on the GPU for the whole batch."""
        return self.attention_of(self.workload.batch, context)

    def attention_of(self, batch: int, context: float) -> float:
        """Seconds of one layer's attention on the GPU for `batch` sequences."""
        m, heads = self.model, self.model.heads // self.ways
        kv_heads = max(1, m.kv_heads // self.ways)
        return gpu_attention.decode(self.gpu, batch, context + 1, heads, kv_heads, m.head_size).seconds

    def attention_prefill_of(self, batch: int, tokens: int) -> float:
        """Seconds of one layer's prefill attention on the GPU."""
        m = self.model
        return gpu_attention.prefill(self.gpu, batch, tokens, 0, m.heads // self.ways, m.head_size).seconds

    def close_layer(
        self, graph: Graph, after: tuple[float, str], ready: Iterable[int], tokens: float | None = None
    ) -> int:
        """Output projection and FFN of `tokens` tokens (default: one per sequence); GPUs that share the layer add up
        their partial sums behind each of the two (ring all-reduce). Returns the layer's last task."""
        seconds, category = after
        done = graph.work("o, ffn", category, "gpu", seconds, ready)
        if self.ways == 1:
            return done
        size = 2 * (self.workload.batch if tokens is None else tokens) * self.model.hidden * FP16_BYTES
        ring = 2 * (self.ways - 1)
        hops = 2 * ring * PEER_HOP_US * 1e-6
        moved = size * ring / self.ways
        return graph.move("all-reduce", "transfer", ("gpu peers",), moved, [done], latency_s=hops)

    def framework(self, graph: Graph, after: Iterable[int]) -> int:
        """Time the framework's thread spends per layer; kernels of the layer wait for it."""
        return graph.work("dispatch", "framework", "framework", self.tuning.layer_overhead_us * 1e-6, after)

    def prefill_layers(self, graph: Graph, layers: int) -> list[int]:
        """Prefill compute of `layers` layers in a chain; returns the last task of each."""
        w = self.workload
        before, after = self.layer_kernels(w.batch * w.input_tokens)
        attention = self.attention_prefill_of(w.batch, w.input_tokens)
        done: list[int] = []
        for layer in range(layers):
            graph.layer = layer
            ready = [self.framework(graph, done[-1:])]
            ready += self.fetch_weights(graph, done)
            qkv = graph.work("qkv", before[1], "gpu", before[0], ready)
            scored = graph.work("attention", "compute", "gpu", attention, [qkv])
            self.store_prefill(graph, qkv)
            done.append(self.close_layer(graph, after, [scored], w.batch * w.input_tokens))
        graph.layer = SETUP
        self.finish(graph, done)
        return done

    def finish(self, graph: Graph, done: list[int]) -> None:
        """LM head after the last layer."""
        seconds, category = self.head_kernel()
        graph.work("lm head", category, "gpu", seconds, done[-1:])

    def fetch_weights(self, graph: Graph, done: list[int]) -> list[int]:
        """Stream the host-resident share of a layer's weights one layer ahead; nothing where all are in HBM."""
        size = self.weights_host_share * self.model.layer_weights * FP16_BYTES
        if not size:
            return []
        move = graph.move("weights", "weight access", ("host dram", "pcie to gpu"), size, done[-2:-1])
        return [move]

    def store_prefill(self, graph: Graph, qkv: int) -> None:
        """Where a layer's new KV goes after `qkv`; stays in GPU memory by default."""


def _total(parts: list[kernels.Kernel]) -> tuple[float, str]:
    """Sum of kernel times; the category follows the longest kernel's bound."""
    longest = max(parts, key=lambda k: k.seconds)
    return sum(k.seconds for k in parts), "compute" if longest.bound == "compute" else "weight access"
