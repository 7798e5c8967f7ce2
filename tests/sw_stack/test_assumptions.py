"""The register of assumptions is complete, unique and the source of the page that shows it."""

from pathlib import Path

import pytest

from golden.spec import KVStrataError
from sw_stack.assumptions import load, markdown

ROOT = Path(__file__).parents[2]
ROW = """[[assumption]]
id = "ENG-01"
name = "sink tokens"
value = 4
source = "choice: StreamingLLM"
range = "1 to 8"
effect = "perplexity"
"""


def test_page_is_up_to_date():
    page = (ROOT / "docs" / "assumptions.md").read_text()
    assert page == markdown(load(ROOT / "docs" / "assumptions.d")), "run make docs"


def test_duplicate_id_is_refused(tmp_path):
    (tmp_path / "a.toml").write_text(ROW + ROW)
    with pytest.raises(KVStrataError, match=r"assumption ids are unique, but a.toml uses ENG-01 again"):
        load(tmp_path)


def test_missing_field_is_named(tmp_path):
    (tmp_path / "a.toml").write_text(ROW.replace('effect = "perplexity"\n', ""))
    with pytest.raises(KVStrataError, match=r"needs a valid effect: a.toml ENG-01: Field required"):
        load(tmp_path)


def test_unknown_field_is_named(tmp_path):
    (tmp_path / "a.toml").write_text(ROW + 'colour = "red"\n')
    with pytest.raises(KVStrataError, match=r"needs a valid colour: a.toml ENG-01"):
        load(tmp_path)
