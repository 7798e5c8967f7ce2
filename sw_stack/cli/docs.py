"""`kvstrata docs`: regenerate the generated pages."""


def command() -> None:
    """Write docs/assumptions.md from the register."""
    from hw.flow.cache import ROOT, write_atomically
    from sw_stack.assumptions import load, markdown
    from sw_stack.cli.output import note

    page = ROOT / "docs" / "assumptions.md"
    write_atomically(page, markdown(load(page.parent / "assumptions.d")))
    note(f"wrote {page.relative_to(ROOT)}")
