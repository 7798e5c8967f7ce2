"""FPGA and computational drives: weights, sinks and the recent window in HBM, the rest of the cache on drives.

Nobody has built this. Per layer the engine computes q, k and v, sends q (and the token that leaves the window) to the
drives, attends to its window while the drives attend to the rest, and merges both partial softmaxes.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from sim.core.graph import SETUP, Graph
from sim.describe.base import ConfigError
from sim.describe.devices import Csd
from sim.describe.model import FP16_BYTES
from sim.devices import fpga as engine
from sim.devices.csd import AttentionUnit, KvReads, attention_unit
from sim.devices.drive import write_bandwidth
from sim.devices.flash import program_load, read_limits
from sim.devices.flash_pages import stream
from sim.devices.flash_reads import even_read_s
from sim.devices.limits import Bandwidth
from sim.result import Residency
from sim.schemes.base import GB, link_bandwidth
from sim.schemes.fpga import FpgaEngine


class FpgaCsd(FpgaEngine):
    """The engine with a window in HBM, and drives that hold and attend to everything older."""

    name: ClassVar[str] = "fpga+csd"
    needs: ClassVar[tuple[str, ...]] = ("fpga", "fpga_link", "csd")

    @property
    def csd(self) -> Csd:
        """The drive."""
        return self.machine.part("csd", self.name)

    @property
    def unit(self) -> AttentionUnit:
        """The attention unit of each drive."""
        return attention_unit(self.csd)

    def place(self) -> None:
        if not self.fpga.window_tokens:
            raise ConfigError(
                f"scheme {self.name} keeps a window in HBM, and fpga {self.fpga.name} has window_tokens = 0"
            )
        super().place()

    def older_tokens(self, context: int) -> int:
        """Cached tokens that live on the drives."""
        return context - engine.attended_tokens(self.fpga, context)

    def residency(self) -> list[Residency]:
        w, count = self.workload, self.machine.csd_count
        older = w.batch * self.older_tokens(w.total_tokens) * self.model.kv_bytes_per_token
        drives = Residency(
            tier="computational drives", used_gb=older / GB, capacity_gb=self.csd.capacity_gb * count
        )
        return [*super().residency(), drives]

    def connect(self) -> None:
        super().connect()
        csd, link, count = self.csd, self.machine.csd_link, self.machine.csd_count
        assert link is not None
        for way in ("fpga to drives", "drives to fpga"):
            ends = link_bandwidth(way, self.machine.fpga_link).limits
            self._pipe(way, Bandwidth(way, {**ends, "drive links": link.payload_gb_per_s * count}))
        limits = {**read_limits(csd).limits, **self.unit.stream_limits()}
        self._pipe("csd flash", Bandwidth("csd flash", {k: v * count for k, v in limits.items()}))
        self._pipe("csd program", write_bandwidth(csd, link, count))

    def page_seconds(self, pipe: str, size_bytes: float) -> float | None:
        if pipe != "csd flash":
            return None
        return stream(self.csd, math.ceil(size_bytes / self.machine.csd_count / self.csd.page_bytes)).seconds

    def prefill(self, graph: Graph, layers: int) -> None:
        super().prefill(graph, layers)
        older = self.workload.batch * self.older_tokens(self.workload.input_tokens)
        ends = [max(i for i, t in enumerate(graph.tasks) if t.layer == layer) for layer in range(layers)]
        for layer, end in enumerate(ends):
            graph.layer = layer
            size = older * self.model.kv_bytes_per_token_layer
            graph.move("store kv", "kv access", ("fpga to drives", "csd program"), size, [end])
        graph.layer = SETUP

    def attend(self, graph: Graph, context: int, after: list[int]) -> list[int]:
        """Window attention on the engine beside the drives' attention to older tokens."""
        window = super().attend(graph, context, after)
        older = self.older_tokens(context)
        if not older:
            return window
        w, m, csd, unit = self.workload, self.model, self.csd, self.unit
        query = w.batch * (m.heads + 2 * m.kv_heads) * m.head_size * FP16_BYTES
        wait = (self.machine.csd_count * csd.command_host_us) * 1e-6
        sent = graph.move("q, k, v", "transfer", ("fpga to drives",), query, after, latency_s=wait)
        # The token that leaves the window is programmed in the background.
        left = w.batch * m.kv_bytes_per_token_layer
        graph.move("append kv", "kv access", ("csd program",), left, [sent])
        load = left * program_load(csd)
        graph.move("programs on the dies", "kv access", ("csd flash",), load, [sent], counted=False)
        size = w.batch * older * m.kv_bytes_per_token_layer
        scores = float(w.batch * m.heads * older)
        reads = KvReads(float(size), w.batch * m.kv_heads, 4 * scores * m.head_size, scores)
        cap = size / even_read_s(csd, size / csd.page_bytes, self.machine.csd_count)
        read = graph.move("read kv", "kv access", ("csd flash",), size, [sent], cap)
        waits = [sent] if unit.streams else [read]
        busy = graph.work(
            "attend", "csd compute", "csd unit", unit.seconds(reads, self.machine.csd_count), waits
        )
        output = w.batch * m.heads * (m.head_size + 2) * FP16_BYTES
        back = graph.move("partials", "transfer", ("drives to fpga",), output, [read, busy])
        return [*window, back]

    def numerics(self) -> str:
        return f"{self.fpga.weight_format}/a8/{self.fpga.kv_format}/dense"

    def flash_written_per_token(self) -> float:
        w = self.workload
        return self.model.kv_bytes_per_token * self.older_tokens(w.total_tokens) / w.output_tokens

    def provenance(self) -> list[dict[str, Any]]:
        return super().provenance() + self.unit.provenance()
