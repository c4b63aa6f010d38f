import math

import pytest

from jaxguard.config.hardware import GIB, HARDWARE_FILE, peak_flops, read_hardware
from jaxguard.plan import targets
from jaxguard.plan.targets import find_cluster
from jaxguard.utils.errors import JaxguardError


@pytest.mark.parametrize(
    ("text", "shape", "devices", "linked"),
    [
        ("a100-80gb:8", (1, 8), 8, 8),
        ("a100-40gb", (1, 8), 8, 8),
        ("h100:4", (1, 4), 4, 4),
        ("h100:16", (2, 8), 16, 8),
        ("b200:18x4", (18, 4), 72, 4),
        ("v5e:16", (4, 4), 16, 16),
        ("v5e:8", (2, 4), 8, 8),
        ("v5p:2x2x1", (2, 2, 1), 4, 4),
        ("v5p:4096", (16, 16, 16), 4096, 4096),
        ("v7x:8", (2, 2, 2), 16, 16),
        ("v5e:2*16x16", (16, 16), 512, 256),
        ("v5p:4*128", (4, 4, 8), 512, 128),
        ("v7x:2*8", (2, 2, 2), 32, 16),
    ],
)
def test_a_target_is_a_name_and_a_shape(text, shape, devices, linked):
    found = find_cluster(text)
    assert (found.shape, found.devices, found.linked) == (shape, devices, linked)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100:8", "'a100-40gb' or 'a100-80gb'"),
        ("a100-80bg:8", "target 'a100-80bg' is unknown: did you mean 'a100-80gb'"),
        ("h100:x", "h100:8"),
        ("h100:0", "h100:8"),
        ("h100:12", "not whole hosts of 8.* 3x4"),
        ("h100:2x2x2", "GPUs come as hosts x GPUs of each"),
        ("h100:2*8", "GPUs have no slices; write hosts x GPUs of each, as in h100:2x8"),
        ("v5e:0*8", "v5e:8"),
        ("v5e:512", r"256 chips.* 2\*256"),
        ("v5p:5", "it comes as 4, 8, 16"),
        ("v5e:3x5", "not one of its topologies, such as 2x2, 2x4, 4x4"),
    ],
)
def test_a_target_that_does_not_exist(text, message):
    with pytest.raises(JaxguardError, match=message):
        find_cluster(text)


def test_a_mistake_in_the_file_names_target_and_field(tmp_path):
    path = tmp_path / "targets.yaml"
    path.write_text(HARDWARE_FILE.read_text().replace("bandwidth: 819e9", "bandwith: 819e9"))
    with pytest.raises(JaxguardError, match=r"targets\.v5e\.bandwith'.*'bandwidth'"):
        read_hardware(path)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("TPU v2", 22.5),
        ("TPU v5e", 197),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
    ],
)
def test_peaks(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA A10G", "NVIDIA GeForce GTX 1080", "AMD Instinct MI300X", "TPU v9"])
def test_unknown_peaks_are_not_guessed(kind):
    assert peak_flops(kind) is None


def test_titles_of_targets_are_matched_by_their_own_pattern():
    for target in read_hardware().targets.values():
        assert target.flops["bfloat16"] == peak_flops(target.title), target.title


def test_every_target_says_where_its_figures_are_from_and_is_plausible():
    for name, target in read_hardware().targets.items():
        assert target.source, name
        assert 16 * GIB <= target.memory < 200 * GIB
        assert target.network < target.link < target.bandwidth
        assert math.log10(target.flops["bfloat16"]) > 14


@pytest.mark.aot
@pytest.mark.parametrize(
    "text",
    ["a100-40gb:8", "h200:2x8", "b200:8", "rtx4090:1", "l4:1", "v4:8", "v5e:16", "v5p:8", "v6e:8", "v7x:8", "v5e:2*4"],
)
def test_the_compilers_know_the_devices(text):
    cluster = find_cluster(text)
    devices = targets.topology(cluster)
    assert len(devices) == cluster.devices
    kind = devices[0].device_kind
    assert peak_flops(kind) == cluster.target.flops["bfloat16"], kind
