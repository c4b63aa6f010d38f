"""Sweeps, with arithmetic instead of XLA."""

import json
from dataclasses import replace

import pytest
from browser import complaints, open_page, requests
from plan_examples import plan_of

from jaxguard.plan import __main__ as command
from jaxguard.plan import sweeps
from jaxguard.plan.compile import OutOfMemoryError
from jaxguard.plan.sweeps import points, read_sweep
from jaxguard.utils.errors import JaxguardError

FILE = """
title: Two <b>ways</b>
series:
  weak: {config: llama8b_full, target: h100, devices: [8, 64, 128], scaling: weak, rows: 4, shard: linked, tensor: 2}
  strong: {config: llama8b_full, set: {data.max_seq_len: 1024}, target: h100, devices: [8, 16], scaling: strong, rows: 64}
"""
compiled = []


def compile_step(config, spec, cluster, rows, targets=None):
    """Products take a second for each row of a device; the network a second for each 32 devices."""
    compiled.append((cluster.devices, rows))
    if cluster.devices == 128:
        raise OutOfMemoryError("too small")
    mesh = {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
    plan = plan_of(40, cluster=cluster, mesh=mesh, traffic=0.0, matmul_flops=989e12 * rows / cluster.devices)
    (gather,) = plan.collectives
    sent = 450e9 * cluster.devices / 32
    return replace(
        plan,
        shape=plan.shape._replace(rows=rows),
        collectives=[replace(gather, group=8, near=8, size=int(sent * 8 / 7))],
    )


@pytest.fixture
def sweep_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "compile_step", compile_step)
    compiled.clear()
    path = tmp_path / "two.yaml"
    path.write_text(FILE)
    return path


def run(path, tmp_path):
    assert command.main(["sweep", str(path), "--output", str(tmp_path / "out")]) == 0
    return [json.loads(file.read_text()) for file in sorted((tmp_path / "out").glob("*.json"))]


def test_weak_scaling_grows_the_batch_and_strong_scaling_shares_it(sweep_file):
    actual = [
        (p.series, p.cluster.devices, p.rows, p.config.mesh.data, p.config.mesh.fsdp)
        for p in points(read_sweep(str(sweep_file)))
    ]
    assert actual == [
        ("weak", 8, 16, 1, 4),
        ("weak", 64, 128, 8, 4),
        ("weak", 128, 256, 16, 4),
        ("strong", 8, 64, 1, 8),
        ("strong", 16, 64, 1, 16),
    ]


def test_a_dry_run_prints_the_points_and_compiles_nothing(sweep_file, tmp_path, capsys):
    folder = tmp_path / "out"
    assert command.main(["sweep", str(sweep_file), "--output", str(folder), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["weak"] * 3 + ["strong"] * 2
    assert "128 rows" in lines[1]
    assert not compiled
    assert not folder.exists()


def test_weights_are_sharded_over_as_many_devices_as_divide_the_models_width(sweep_file):
    sweep_file.write_text(
        "title: Gemma\nseries:\n  4b: {config: gemma4b_full, target: v5p, devices: [8, 4096], scaling: weak, rows: 4}\n"
    )
    actual = [(p.config.mesh.data, p.config.mesh.fsdp, p.rows) for p in points(read_sweep(str(sweep_file)))]
    assert actual == [(1, 8, 32), (8, 512, 16384)]  # 2,560 is 512 × 5


def test_every_shipped_sweep_describes_possible_points():
    for path in sweeps.SWEEP_FOLDER.glob("*.yaml"):
        assert list(points(read_sweep(path.stem)))


def test_what_is_compiled_is_not_compiled_again_unless_it_changed(sweep_file, tmp_path):
    run(sweep_file, tmp_path)
    assert len(compiled) == 5
    (tmp_path / "out" / "weak-64.json").write_text('{"key": "of another config"}')
    sweep_file.write_text(FILE.replace("data.max_seq_len: 1024", "data.max_seq_len: 512"))
    compiled.clear()
    run(sweep_file, tmp_path)
    assert compiled == [(64, 128), (8, 64), (16, 64)]


def test_efficiency_is_relative_to_the_smallest_cluster(sweep_file, tmp_path):
    report = sweeps.sweep(str(sweep_file), tmp_path / "out")
    small, large = report.series()["strong"]
    assert (small["devices"], large["devices"]) == (8, 16)
    assert small["efficiency"] == 1
    # 8 s of products and 0.25 of network, against 4 and 0.5, on twice the devices.
    assert large["efficiency"] == pytest.approx(64 / 4.5 / 16 / (64 / 8.25 / 8), rel=1e-3)


def test_a_sharding_pays_while_products_take_longer_than_the_network(sweep_file, tmp_path):
    run(sweep_file, tmp_path)
    # Weak: 2 s of products, and 64 devices are 2 s of network.
    limits = sweeps.sweep(str(sweep_file), tmp_path / "out").limits()
    assert limits == ["weak: up to 64 devices", "strong: up to 16 devices"]
    assert "<svg" in (tmp_path / "out" / "sweep.svg").read_text()
    text = (tmp_path / "out" / "sweep.md").read_text()
    assert "too small" in text
    assert "| strong | 16 | 1×16×1 | 64 | 40.0 | yes |" in text


def test_a_mistake_names_its_series(sweep_file):
    sweep_file.write_text(FILE.replace("data.max_seq_len", "data.max_seq_lenn"))
    with pytest.raises(JaxguardError, match=r"series strong: .*did you mean 'max_seq_len'"):
        list(points(read_sweep(str(sweep_file))))


def test_the_page_shows_its_curves_and_loads_nothing(browser, sweep_file, tmp_path):
    run(sweep_file, tmp_path)
    open_page(browser, tmp_path / "out" / "sweep.html")
    text = browser.execute_script("return document.body.innerText")
    assert "Two <b>ways</b>" in text
    assert "strong: up to 16 devices" in text
    assert browser.execute_script("return document.querySelectorAll('svg').length") == 1
    assert (complaints(browser), requests(browser)) == ([], [])
