"""The two basic blocks on their own: cycles with a weight beat, and an attention head over its bound."""

from typing import Any


def run() -> list[dict[str, Any]]:
    """4096 x 4096 products on the `small` engine; one head of 1,536 tokens on one kernel."""
    from sw_stack.rtl.calibrate import TABLES

    basic = [table for table in TABLES if table.block in ("mv_core", "attention_head")]
    tables = {table.block: {row["name"]: row for row in table.measure()["rows"]} for table in basic}
    matrix, head = tables["mv_core"], tables["attention_head"]["dense head, 1 queries, 1536 tokens x 128"]
    shapes = {"w4": "w4 4096 x 4096", "w8": "w8 2048 x 2048"}
    rows = [
        {
            "id": f"rtl.mv_core.beat_fraction.{name}",
            "value": matrix[shape]["bound_cycles"] / matrix[shape]["cycles"],
            "unit": "bound cycles per cycle",
            "target": 0.95,
            "better": "higher",
        }
        for name, shape in shapes.items()
    ]
    ratio = head["cycles"] / head["bound_cycles"]
    rows.append(
        {
            "id": "rtl.attention_head.bound_ratio",
            "value": ratio,
            "unit": "cycles per bound",
            "target": 1.1,
            "better": "lower",
        }
    )
    return rows
