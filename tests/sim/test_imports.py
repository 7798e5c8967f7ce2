"""Importing the system model stays light: plots, tables, optimisers and engines load when used."""

import subprocess
import sys

HEAVY = ("matplotlib", "polars", "optuna", "dask", "torch", "amaranth", "scipy")


def test_import_of_the_api_loads_nothing_heavy():
    code = "import sys, sim.api; print([m for m in sys.argv[1:] if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
