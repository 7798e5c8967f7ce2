"""`kvstrata disasm`: instruction streams as text."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    path: Annotated[Path, typer.Argument(help="image directory, or an encoded program of `compile --out`")],
    program: Annotated[str, typer.Option(help="program of an image: decode, prefill or head")] = "decode",
    first: Annotated[int, typer.Option(min=0, help="first instruction shown")] = 0,
    count: Annotated[int, typer.Option(min=1, help="instructions shown")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="print the lines as JSON")] = False,
) -> None:
    """Print instructions with their fields, registers and dependency tokens."""
    import numpy as np

    from golden.spec import KVStrataError
    from sw_stack.cli.output import show_json
    from sw_stack.compile.decoder import compile_model
    from sw_stack.compile.disasm import disassemble
    from sw_stack.pack.image import Image

    notes: list[str] = []
    if path.is_dir():
        image = Image.open(path, verify=False)
        known = compile_model(image.map, image.norm_exponents).programs
        if program not in known:
            raise KVStrataError(f"a program is one of {', '.join(known)}; got {program!r}")
        stream = known[program].encoded()
        notes = [i.note for i in known[program].instructions]
    elif path.is_file():
        stream = np.fromfile(path, np.uint8)
    else:
        raise KVStrataError(f"an image directory or a program file is needed; {path} does not exist")
    lines = disassemble(stream)[first : first + count]
    if notes:
        lines = [f"{line:<100s} ; {note}" for line, note in zip(lines, notes[first:])]
    if as_json:
        show_json(lines)
        return
    typer.echo("\n".join(lines))
