"""`kvstrata bench`: measured performance of the toolkit itself and of the hardware it describes."""

from typing import Annotated

import typer


def command(
    only: Annotated[list[str] | None, typer.Argument(help="areas to run; all if none is named")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Run the benchmarks of tools/bench and write build/bench/<area>.json and docs/benchmarks.md."""
    import importlib.util
    import json

    from golden.spec import KVStrataError
    from hw.flow.cache import ROOT, build_dir, write_atomically
    from sw_stack.cli.output import show_rows, track
    from sw_stack.report import benchmarks

    files = {path.stem: path for path in sorted((ROOT / "tools" / "bench").glob("*.py"))}
    if unknown := set(only or ()) - set(files):
        raise KVStrataError(
            f"a benchmark area is one of {', '.join(files)}, not {', '.join(sorted(unknown))!r}"
        )
    rows = []
    for area in track(only or list(files), "Benchmarks"):
        spec = importlib.util.spec_from_file_location(f"bench_{area}", files[area])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        measured = module.run()
        write_atomically(build_dir() / "bench" / f"{area}.json", json.dumps(measured, indent=1) + "\n")
        rows += measured
    benchmarks.write(build_dir() / "bench", ROOT / "docs" / "benchmarks.md")
    show_rows("Benchmarks", rows, as_json)
