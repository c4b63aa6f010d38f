import importlib.util

import pytest

from jaxguard.errors import JaxguardError
from jaxguard.plan import targets
from jaxguard.plan.targets import TARGETS, find_target


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("a100-80gb:8", "a100-80gb", 8),
        ("a100-40gb", "a100-40gb", 8),
        ("h100:16", "h100", 16),
        ("tpu-v5e:16", "tpu-v5e", 16),
    ],
)
def test_a_target_is_a_name_and_a_number(text, name, devices):
    assert find_target(text) == (TARGETS[name], devices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100:8", "target 'a100' is unknown; known: a100-40gb, a100-80gb"),
        ("h100:x", "write the number of devices after the colon, as in h100:8"),
        ("h100:0", "write the number of devices"),
        ("h100:12", "a multiple of 8 devices"),
        ("tpu-v5p:5", "comes as 4, 8, 16, 32, 64 devices"),
    ],
)
def test_a_target_that_does_not_exist(text, message):
    with pytest.raises(JaxguardError, match=message):
        find_target(text)


@pytest.mark.parametrize("text", ["h100:8", "tpu-v5e:8"])
def test_a_compiler_that_is_not_installed(monkeypatch, text):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JaxguardError, match=r"pip install 'jaxguard\[aot\]'"):
        targets.topology(text)


def test_slices_have_as_many_devices_as_they_say():
    for target in TARGETS.values():
        for devices, slice_name in target.slices:
            sides = [int(side) for side in slice_name.split(":")[1].split("x")]
            product = 1
            for side in sides:
                product *= side
            assert product == devices
