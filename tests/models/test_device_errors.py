"""Devices that are not there, idle or full: what is said of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxguard.config import load
from jaxguard.models.devices import explain_memory, find_devices
from jaxguard.models.sharding import make_mesh
from jaxguard.train import loop
from jaxguard.train.__main__ import main
from jaxguard.utils.errors import JaxguardError


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'cuda': no device"), AssertionError()])
def test_a_platform_that_is_not_there(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(JaxguardError, match=r"JAX_PLATFORMS=cuda .*jax\[cuda12\].*unset JAX_PLATFORMS"):
        make_mesh(load("tiny").mesh)


@pytest.mark.parametrize(
    ("files", "platforms", "word"),
    [
        (["nvidia0", "nvidiactl"], None, "jax[cuda12]"),
        (["accel0", "accel1"], "", "jax[tpu]"),
        (["nvidia0"], "cpu", None),
        (["nvidiactl", "accel", "tty0"], None, None),
    ],
)
def test_an_accelerator_that_is_idle(monkeypatch, tmp_path, caplog, files, platforms, word):
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.delenv("JAX_PLATFORMS")
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    for _ in range(2):
        assert find_devices(tmp_path)[0].platform == "cpu"
    assert len(caplog.messages) == (word is not None)
    assert word is None or word in caplog.text


def allocate():
    """XLA's own error, of a device that is full."""
    jax.jit(lambda: jnp.zeros((1 << 20, 1 << 22)) + 1)().block_until_ready()


def starve():
    np.zeros((1 << 24, 1 << 24))


def break_otherwise():
    raise RuntimeError("another error")


def test_memory_that_is_not_enough_names_the_remedy():
    for exhaust in (allocate, starve):
        with pytest.raises(JaxguardError, match="more memory"), explain_memory("get more memory"):
            exhaust()
    with pytest.raises(RuntimeError, match="another error"), explain_memory("get more memory"):
        break_otherwise()


def test_a_training_that_does_not_fit_names_fields_and_plan(tiny_config, monkeypatch, capsys):
    monkeypatch.setattr(loop, "start_state", lambda run: allocate())
    assert main(["--config", str(tiny_config), "mesh.fsdp=-1"]) == 2
    error = capsys.readouterr().err
    for word in ("train.accumulation", "data.max_seq_len", "model.remat", "mesh.fsdp", "jaxguard plan --config"):
        assert word in error
