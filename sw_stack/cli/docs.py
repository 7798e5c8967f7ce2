"""`kvstrata docs`: regenerate the generated pages."""

LEAST_TOKENS = 32
"""Reports of fewer generated tokens are tests' and not for README."""


def command() -> None:
    """Write docs/assumptions.md from the register, docs/benchmarks.md from the last benchmarks, and README's
    reproduction and results, the latter from the last report."""
    import json

    from hw.flow.cache import ROOT, build_dir, write_atomically
    from sw_stack.assumptions import load, markdown
    from sw_stack.cli.output import note
    from sw_stack.report import benchmarks
    from sw_stack.report.readme import with_hardware_text, with_reproduction, with_results

    page = ROOT / "docs" / "assumptions.md"
    write_atomically(page, markdown(load(page.parent / "assumptions.d")))
    note(f"wrote {page.relative_to(ROOT)}")
    benchmarks.write(build_dir() / "bench", ROOT / "docs" / "benchmarks.md")
    note("wrote docs/benchmarks.md")
    readme = ROOT / "README.md"
    write_atomically(readme, with_reproduction(readme.read_text()))
    note("wrote the reproduction table of README.md")
    text = build_dir() / "rtl-text.json"
    if text.is_file():
        write_atomically(readme, with_hardware_text(readme.read_text(), json.loads(text.read_text())))
        note("wrote the hardware's text of README.md")
    summary = build_dir() / "report" / "summary.json"
    if not summary.is_file():
        note("README.md keeps its results: there is no report yet (make sim)")
        return
    told = json.loads(summary.read_text())
    if told["generated"]["new_tokens"] < LEAST_TOKENS:
        note("README.md keeps its results: the last report is of a shortened run (make sim)")
        return
    write_atomically(readme, with_results(readme.read_text(), told))
    note("wrote the results of README.md")
