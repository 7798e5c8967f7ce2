"""Generated pages: README's reproduction is the model's, the benchmark page says what was measured."""

import json
from pathlib import Path

import pytest

from golden.spec import KVStrataError
from sw_stack.report import benchmarks, hardware, resources
from sw_stack.report.readme import with_reproduction

README = Path(__file__).parents[2] / "README.md"


def test_the_reproduction_in_readme_is_current() -> None:
    page = README.read_text()
    assert with_reproduction(page) == page, "run `kvstrata docs`"


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(KVStrataError, match="README.md holds a block between"):
        with_reproduction("# nothing here\n")


def test_the_benchmark_page_marks_what_is_missed(tmp_path: Path) -> None:
    rows = [
        {"id": "a.fast", "value": 3.0, "unit": "ms", "target": 5, "better": "lower"},
        {"id": "a.slow", "value": 7.0, "unit": "GB/s", "target": 8.5, "better": "higher"},
        {"id": "a.told", "value": 12345.678, "unit": "pages", "target": None, "better": "higher"},
    ]
    (tmp_path / "area.json").write_text(json.dumps(rows))
    page = benchmarks.markdown(benchmarks.measured(tmp_path))
    assert "| `a.fast` | 3 | ms | at most 5 | yes |" in page
    assert "| `a.slow` | 7 | GB/s | at least 8.5 | no |" in page
    assert "| `a.told` | 1.235e+04 | pages |  |  |" in page


def test_areas_that_were_not_measured_keep_their_section() -> None:
    row = {"id": "b.x", "value": 1.0, "unit": "s", "target": None, "better": "lower"}
    first = benchmarks.markdown({"b": [row], "c": [{**row, "id": "c.x"}]})
    second = benchmarks.markdown({"a": [row], "c": [{**row, "id": "c.y"}]}, first)
    assert [line for line in second.splitlines() if line.startswith("## ")] == ["## a", "## b", "## c"]
    assert "c.y" in second
    assert "c.x" not in second
    assert benchmarks.markdown({}, second) == second


def test_a_torn_benchmark_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "area.json").write_text("[{")
    with pytest.raises(KVStrataError, match=r"area.json is not valid JSON: run `make bench` again"):
        benchmarks.measured(tmp_path)


def test_the_committed_benchmark_page_holds_every_area() -> None:
    page = (README.parent / "docs" / "benchmarks.md").read_text()
    assert "## sim" in page
    assert "`sim.reproduce.mean_abs_error_pct`" in page


def test_the_report_says_why_bandwidths_are_low_and_what_was_published() -> None:
    from sim.api import simulate
    from sim.describe.workload import Workload
    from sw_stack.report import machine

    results = [
        simulate("reference", "opt-13b", s, Workload(batch=4)) for s in ("csd-sparf", "flexgen-ssd", "fpga")
    ]
    told = machine.facts(results, results)
    drawn = machine.figures("reference", results, results)
    found = machine.sections(told, drawn)
    assert [s["title"] for s in found] == [
        "Why is a bandwidth this low?", "Energy, cost and lifetime", "Published and modelled", "Other systems",
    ]  # fmt: skip
    assert set(drawn) == {"pareto", "roofline", "utilisation"}
    flash = next(b for b in told["bandwidths"] if b["what"] == "csd flash")
    assert flash["binding"] == "flash array"
    assert flash["limits"].startswith("flash array")
    assert {"gpu", "host"} <= {a["device"].split("/")[0] for a in results[1].assumptions}
    for section in found:
        for row in section["rows"]:
            assert all(
                column.text(row)
                for column in section["columns"]
                if column.title not in ("Flash life, years", "Busy")
            )
    assert "contradict" in found[2]["text"]


def test_a_machine_without_a_gpu_has_no_roofline() -> None:
    from sim.api import simulate
    from sim.describe.workload import Workload
    from sw_stack.report import machine

    results = [simulate("u280", "llama-2-7b", "fpga", Workload(batch=1))]
    assert "roofline" not in machine.figures("u280", results, results)


def test_the_report_shows_cycles_against_bounds_and_resources_beside_published_ones() -> None:
    told = hardware.facts()
    found = hardware.sections(told, hardware.figures(told["bounds"]))
    assert [s["title"] for s in found] == ["How close is the RTL to its bounds?", "What does it take?"]
    layers = {row["shape"].split(", ")[1] for row in told["bounds"] if "decoder layer" in row["block"]}
    assert layers == {"w8", "w4", "w2", "w2s24"}
    assert {"dense", "SparF clustered", "SparF random"} <= {r["shape"].split(",")[0] for r in told["bounds"]}
    assert all(row["bound_cycles"] <= row["cycles"] and row["gb_per_s"] > 0 for row in told["bounds"])
    flash = [row["gb_per_s"] for row in told["bounds"] if row["block"].startswith("in-storage unit")]
    assert max(flash) <= 11.2
    sources = {(row["part"], row["source"]) for row in told["resources"]}
    assert {("total", "here"), ("total", "published: AccLLM"), ("NFC", "published: InstInfer")} <= sources
    assert all(column.text(row) is not None for s in found for row in s["rows"] for column in s["columns"])


def test_a_table_of_resources_that_is_none_is_refused(tmp_path: Path) -> None:
    for text in ("[{", "[1]", '[{"design": "engine"}]'):
        (tmp_path / "resources.json").write_text(text)
        with pytest.raises(
            KVStrataError, match=r"resources.json must hold the resources that `kvstrata synth`"
        ):
            resources.stored(tmp_path / "resources.json")


@pytest.mark.slow
def test_the_stored_resources_are_what_synthesis_gives() -> None:
    assert resources.synthesised() == resources.stored()
