"""The command line's shell: verbs, errors in one sentence, and what goes to which stream."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).parent / "kvstrata"


def run(*arguments, **kwargs):
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False, **kwargs)


def test_help_lists_every_verb():
    from sw_stack.cli import VERBS

    text = run("--help").stdout
    assert all(verb in text for verb in VERBS)


def test_makefile_help_lists_every_verb():
    root = Path(__file__).parents[2]
    shown = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True).stdout
    wanted = [
        "setup",
        "sim",
        "test",
        "lint",
        "test-rtl",
        "regress",
        "verilog",
        "synth",
        "formal",
        "calibrate",
    ]
    wanted += ["bench", "notebooks", "clean"]
    assert set(wanted) <= {line.split()[0] for line in shown.splitlines()}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "--prompt", " "], "a prompt has at least one character that is not a space"),
        (["generate", "--prompt", "x", "--model", "missing.gguf"], "existing file, got missing.gguf"),
        (["generate", "--prompt", "x", "--policy", "gpu"], "a policy is one of dense, lambda; got 'gpu'"),
        (
            ["generate", "--prompt", "x", "--placement", "csd"],
            "--placement is of a device; got it without --device",
        ),
        (
            ["generate", "--prompt", "x", "--device", "golden", "--window", "9"],
            "--window is of policy lambda or placement engine+csd; got dense, engine",
        ),
        (
            ["generate", "--prompt", "x", "--device", "golden", "--level", "float"],
            "a device computes at level exact; got float",
        ),
        (["synth", "--family", "ecp6"], "a family is one of xcup, xc7"),
        (["bench", "nothing"], "a benchmark area is one of"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    result = run(*arguments)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert sentence in lines[0]


def test_truncated_model_is_one_sentence(tmp_path):
    from golden.loaders import smollm2_path

    cut = tmp_path / "cut.gguf"
    with smollm2_path().open("rb") as whole:
        cut.write_bytes(whole.read(1_000_000))
    result = run("generate", "--prompt", "x", "--model", str(cut))
    assert result.returncode == 1
    assert "cut.gguf" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_json_goes_to_standard_output_alone():
    result = run("generate", "--prompt", "Say yes.", "--tokens", "2", "--level", "float", "--json")
    answer = json.loads(result.stdout)
    assert len(answer["tokens"]) == 2
    assert answer["level"] == "float"
