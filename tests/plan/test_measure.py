"""Scaling measured on this host's fake devices: the mechanics, not the speed."""

import json

import pytest

from jaxguard.plan import __main__ as command
from jaxguard.plan.measure import measure
from jaxguard.utils.errors import JaxguardError


def test_growing_numbers_of_devices_take_the_same_steps(tiny_config, tmp_path, capsys):
    file = tmp_path / "scaling.json"
    arguments = ("--devices", "1,4", "--rows", "4", "--steps", "2", "--target", "a100-80gb", "--json", str(file))
    assert command.main(["measure", "--config", str(tiny_config), *arguments, "data.max_seq_len=128"]) == 0
    assert "predicted for NVIDIA A100-SXM4-80GB" in capsys.readouterr().out
    one, four = json.loads(file.read_text())
    assert [one["mesh"], four["mesh"]] == [{"data": 1, "fsdp": n, "tensor": 1} for n in (1, 4)]
    assert one["sent"] == 0
    assert four["sent"] > 0, "the plan is that of the program that ran"
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for figures in (one, four):
        assert len(figures["seconds"]) == 2
        fastest, slowest = (4 * 128 / pick(figures["seconds"]) for pick in (min, max))
        assert slowest <= figures["tokens_per_second"]["measured"] <= fastest
        seconds = 4 * 128 / figures["tokens_per_second"]["measured"]
        flops = figures["analytic_flops_of_all"]["model"]  # in float32
        assert figures["mfu"]["measured"] == pytest.approx(flops / seconds / figures["devices"] / 19.5e12, rel=1e-6)
        assert figures["tokens_per_second"]["predicted"] == pytest.approx(4 * 128 / figures["estimate"]["step"])
    speeds = [figures["tokens_per_second"]["measured"] for figures in (one, four)]
    assert one["efficiency"] == {"measured": 1, "predicted": 1}
    assert four["efficiency"]["measured"] == pytest.approx(speeds[1] / 4 / speeds[0])


def test_every_device_keeps_its_rows_in_weak_scaling(tiny_config):
    settings = {"rows": 2, "weak": True, "steps": 1, "target": "h100"}
    report = measure(tiny_config, [2, 4], **settings)
    assert [m.plan.shape.rows for m in report.measurements] == [2, 4]


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        ([16], {"target": "h100"}, r"--devices 16: there are 8"),
        ([], {}, r"no target describes cpu.*--target"),
        ([], {"target": "h1000"}, r"'h1000' is unknown: did you mean 'h100'"),
        ([4], {"target": "h100", "rows": 6}, r"6 rows cannot be divided over 4 devices: use a multiple of 4"),
    ],
)
def test_a_measurement_that_cannot_be_says_why(tiny_config, sizes, settings, message):
    with pytest.raises(JaxguardError, match=message):
        measure(tiny_config, sizes, **settings)
