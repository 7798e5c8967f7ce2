"""The in-storage unit's RTL behind the firmware: its page requests are answered from the FTL's maps.

A job's pages are looked up in the maps as the firmware does for the unit's page requests: physical page number and
mapped, or a page of the group buffer. The Verilated unit then walks them by itself. What flash does not hold (the tail
of a sequence, and channel pages that are not written yet) comes from the group buffer, as in `HeadPages`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from golden.spec import KVStrataError
from golden.spec.storage import PPN, PageKind, Status
from golden.storage.attention import mean_value
from golden.storage.layout import Geometry as PageGeometry
from sw_stack.drive import shape as pages
from sw_stack.drive.attention import HeadPages, Job, Outcome
from sw_stack.drive.errors import DriveError
from sw_stack.drive.flash import Geometry
from sw_stack.rtl import storage as rtl

READ_NS = 500
"""Array read time of the simulated flash: short, since nothing but the bits is asked for."""


@dataclass
class RtlUnit:
    """`AttentionUnit` on the Verilated unit; its flash has the FTL's geometry. `cycles` per job, in order.

    Raises DriveError when the unit ends a job with a fault.
    """

    config: rtl.UnitConfig
    cycles: list[int] = field(default_factory=list)

    def attend(self, job: Job, source: HeadPages) -> Outcome:
        """See AttentionUnit."""
        cache = self._cache(job, source)
        mean = mean_value(source.all_tokens(PageKind.V_TOKEN, job.tokens)) if job.sparse else None
        asked = rtl.Job(source.batch, source.head, job.q, job.tokens, job.r, job.k, job.window, mean)
        result = rtl.run(cache, [asked], self.config, read_ns=READ_NS)
        done = result.completions[0]
        if done.status is not Status.OK or done.output is None:
            raise DriveError(
                0,
                f"the in-storage unit ended a job of {job.tokens} tokens with {Status(done.status).name.lower()}",
            )
        self.cycles.append(result.cycles)
        return Outcome(done.output, done.maximum, done.sum)

    def _cache(self, job: Job, source: HeadPages) -> rtl.Cache:
        """The job's pages by request key: physical pages from the maps, the rest in the group buffer."""
        flash, shape = source.ftl.flash, source.shape
        if flash.geometry.channels != self.config.channels:
            raise KVStrataError(
                f"the unit has {self.config.channels} flash channels; got a drive of {flash.geometry.channels}"
            )
        geometry = PageGeometry(
            channels=flash.geometry.channels, dies=flash.geometry.dies_per_channel,
            blocks=flash.geometry.blocks_per_die, pages=flash.geometry.pages_per_block,
        )  # fmt: skip
        cache = rtl.Cache(shape.head_size, shape.channels_per_page, geometry)
        groups = -(-job.tokens // shape.tokens_per_page)
        keys = source.all_tokens(PageKind.K_TOKEN, job.tokens).view(np.uint16)
        values = source.all_tokens(PageKind.V_TOKEN, job.tokens).view(np.uint16)
        token_span, segments = groups * shape.tokens_per_page, -(-job.tokens // shape.segment_tokens)
        views = [
            (PageKind.K_TOKEN, groups, pages.k_token_pages(shape, _padded(keys, token_span))),
            (PageKind.V_TOKEN, groups, pages.v_token_pages(shape, _padded(values, token_span))),
        ]
        if job.sparse:
            whole = pages.k_channel_pages(shape, _padded(keys, segments * shape.segment_tokens))
            views.append((PageKind.K_CHANNEL, segments * shape.channel_groups, whole))
        for view, count, buffered in views:
            self._place(cache, source, view, count, buffered)
        return cache

    @staticmethod
    def _place(cache: rtl.Cache, source: HeadPages, view: PageKind, count: int, buffered: np.ndarray) -> None:
        """Map entries of one view; pages that flash holds are read from flash, never from `buffered`."""
        ftl = source.ftl
        head, groups = np.array([source.head]), np.arange(count)
        ppns = ftl.resolve(source.task, source.batch, source.layer, view, head, groups)[0]
        held = int(ftl.existing(source.task, source.batch).tokens[source.layer])
        span = 0 if view is PageKind.K_CHANNEL else source.shape.tokens_per_page
        for index, ppn in enumerate(ppns):
            key = rtl.request_key(kind=view, kv_head=source.head, sequence=source.batch, index=index)
            if ppn < 0 or (index + 1) * span > held:
                number = len(cache.dram)
                cache.dram[number] = buffered[index].tobytes()
                cache.maps[key] = number, 1
                continue
            number = physical_page(int(ppn), ftl.flash.geometry)
            data, failed = ftl.flash.read(np.array([ppn]))
            cache.flash[number] = data[0].tobytes()
            if failed[0]:
                cache.failing.append(number)
            cache.maps[key] = number, 0


def physical_page(ppn: int, geometry: Geometry) -> int:
    """The flash-side interface's page number of a page of the FTL's array."""
    block, page = divmod(ppn, geometry.pages_per_block)
    die, block = divmod(block, geometry.blocks_per_die)
    die, channel = divmod(die, geometry.channels)
    return PPN.pack({"page": page, "block": block, "plane": 0, "die": die, "channel": channel})


def _padded(rows: np.ndarray, tokens: int) -> np.ndarray:
    return np.concatenate([rows, np.zeros((tokens - len(rows), rows.shape[1]), rows.dtype)])
