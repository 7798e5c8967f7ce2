"""Hardware of a sweep's points: what is measured, and what says why it is not."""

import pytest

from sw_stack.chain.verify import CardConfig, DriveConfig, configurations, measure

AXES = ["machine", "model", "scheme", "csd.channels", "workload.batch"]


def point(machine, model, scheme, channels=8):
    return {
        "machine": machine,
        "model": model,
        "scheme": scheme,
        "csd.channels": channels,
        "workload.batch": 4,
    }


def test_points_give_each_hardware_once():
    rows = [
        point("reference", "llama-2-7b", s, c) for s in ("csd-dense", "csd-sparf", "fpga+csd") for c in (4, 8)
    ]
    found = configurations(rows, AXES)
    assert [c.channels for c in found if isinstance(c, DriveConfig)] == [4, 8]
    assert [c.weight_format for c in found if isinstance(c, CardConfig)] == ["w2s24"]


def test_a_scheme_without_such_hardware_gives_none():
    assert configurations([point("reference", "llama-2-7b", "gpu-resident")], AXES) == []


def test_published_units_say_that_their_rtl_is_not_here():
    (text,) = configurations([point("instinfer", "opt-13b", "csd-dense")], AXES)
    assert text == "instcsd-published is a published unit, whose RTL is not here"
    assert measure(text)["rtl_cycles"] is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DriveConfig(16, 1.4, 285.0, 128, 2), "1, 2, 4 or 8 flash channels, not 16"),
        (DriveConfig(8, 1.4, 285.0, 80, 2), "heads of 64 or 128, not 80"),
        (CardConfig(100.0, 4096.0, "w4"), "channels of 64 bytes with whole lanes of 32"),
        (CardConfig(256.0, 1280.0, "w4"), "lanes_per_channel must be 2, 4, 6 or 8"),
    ],
)
def test_what_the_rtl_does_not_have_is_one_sentence(config, reason):
    row = measure(config)
    assert reason in row["run"]
    assert row["rtl_cycles"] is None


@pytest.mark.slow
def test_the_model_charges_what_the_rtl_takes():
    for config in (CardConfig(256.0, 1024.0, "w4"), DriveConfig(8, 1.4, 285.0, 128, 2)):
        row = measure(config)
        assert abs(row["difference_pct"]) < 10, row
