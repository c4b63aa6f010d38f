"""Messages where planning fails: one, about what, and what to do. Only the marked tests use a compiler."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest
from plan_examples import plan_of

from jaxguard.config.hardware import GIB
from jaxguard.models.compute import Compute
from jaxguard.plan import __main__ as command
from jaxguard.plan import compile as compile_module
from jaxguard.plan import run as run_module
from jaxguard.plan.compile import OutOfMemoryError
from jaxguard.utils.versions import install

RUN = ("--config", "llama8b_5k")
REFUSAL = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G of 15.48G hbm. Exceeded hbm
 capacity by 6.47G.

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(step)/transpose(jvp())/while/body/dot_general" source_file="decoder.py" source_line=1
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     ==========================

  2. Size: 64.00M
     Shape: bf16[32,1048576]{1,0:T(8,128)}
     Unpadded size: 64.00M
"""
EARLY = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (61.69G) exceeds available "
    "HBM (15.75G)."
)


@pytest.fixture
def fake_devices(monkeypatch):
    """This host's fake ones in place of a target's."""
    monkeypatch.setattr(compile_module, "topology", lambda cluster: jax.devices()[: cluster.devices])


def refused(capsys, *arguments):
    """The one line of the error."""
    assert command.main([*RUN, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (message,) = err.splitlines()
    assert message.startswith("error: ")
    return message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "a100:8"], "target 'a100' is unknown: did you mean 'a100-40gb' or 'a100-80gb'?"),
        (["--target", "v5e:3x5"], "not one of its topologies, such as 2x2"),
        (["--target", "h100:8", "mesh.fsdp=0"], "fsdp must be positive, or -1"),
        (["--target", "h100:8", "model.attention=splash"], "did you mean 'flash'"),
        (["--target", "h100:8", "--compare", "model.remat='dots"], "model.remat='dots"),
        (["--target", "h100:8", "model.checkpoint=a/b"], "put its config.json into"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


@pytest.mark.usefixtures("fake_devices")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mesh.fsdp=3"], "mesh.fsdp=3 × mesh.tensor=1 is 3 devices, but there are 8 (cpu); set mesh.fsdp=-1"),
        (["train.batch_size=4"], "train.batch_size=4 cannot be divided over mesh.data × mesh.fsdp = 8 devices"),
        (["--rows", "12"], "--rows 16"),
        (["--targets", "9999"], "--targets 9999 is more than a row has: data.max_seq_len=2048"),
        (["model.attention=cudnn"], "it needs an NVIDIA GPU, and this is cpu; set model.attention=auto"),
    ],
)
def test_what_does_not_go_together_is_one_line(capsys, arguments, message):
    assert message in refused(capsys, "--target", "a100-80gb:8", *arguments)


@pytest.mark.parametrize("target", ["h100:8", "v5e:8"])
def test_a_compiler_that_is_not_installed(capsys, monkeypatch, target):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = refused(capsys, "--target", target)
    assert text.endswith(f"target '{target}': its compiler is not installed: {install('aot')}")


@pytest.mark.parametrize("error", [RuntimeError("no such chip\nat line 1"), NotImplementedError("no such chip")])
def test_a_compiler_that_does_not_know_the_target(capsys, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    assert refused(capsys, "--target", "h100:8").endswith(": no such chip")


@pytest.mark.parametrize("rows", ["0", "-8", "many"])
def test_rows_are_a_number(capsys, rows):
    assert command.main([*RUN, "--target", "h100:8", "--rows", rows]) == 2
    assert "is not a whole number above 0" in capsys.readouterr().err


def planned(monkeypatch, capsys, compile_step, *arguments):
    """The exit code and the output, lines joined."""
    monkeypatch.setattr(run_module, "compile_step", compile_step)
    code = command.main([*RUN, *arguments])
    out, err = capsys.readouterr()
    assert err == ""
    return code, " ".join(out.split())


def test_a_gpus_plan_that_does_not_fit_says_what_is_large_and_what_to_try(monkeypatch, capsys):
    plan = plan_of(61)
    code, text = planned(monkeypatch, capsys, lambda *_: plan, "--target", "a100-80gb:8")
    assert code == command.DOES_NOT_FIT
    assert "llama8b_5k on a100-80gb:8 does not fit: it needs 61.00 GiB of 60.0 usable; try a larger" in text
    assert text.index("bf16[3,1024,1024,512]") < text.index("does not fit: it needs")
    assert "model.remat=full" not in text, "it has that already"
    for remedy in ("train.accumulation", "train.batch_size", "data.max_seq_len", "more devices", "--search"):
        assert remedy in text
    dots = plan_of(61, compute=Compute(plan.compute.dtype, "xla", "dots"))
    assert "try model.remat=full, " in planned(monkeypatch, capsys, lambda *_: dots, "--target", "a100-80gb:8")[1]


def test_a_state_that_is_too_large_by_itself_needs_more_devices(monkeypatch, capsys):
    large = plan_of(70, arguments=65 * GIB)
    _, text = planned(monkeypatch, capsys, lambda *_: large, "--target", "a100-80gb:8")
    assert "65.00 GiB: take more devices" in text
    assert "accumulation" not in text


def test_a_tpus_refusal_does_not_hide_the_plans_beside_it(monkeypatch, capsys, tmp_path):
    def compile_step(config, spec, cluster, rows, targets, largest):
        if cluster.target.tpu:
            raise OutOfMemoryError(REFUSAL)
        return plan_of(40)

    files = ["--json", str(tmp_path / "plan.json"), "--html", str(tmp_path / "plan.html")]
    both = ["--target", "v5e:8", "--target", "a100-80gb:8"]
    code, text = planned(monkeypatch, capsys, compile_step, *both, "model.remat=dots", *files)
    assert code == command.DOES_NOT_FIT
    assert "40.00 GiB of 60.0 usable: fits" in text
    assert "on v5e:8 does not fit: it needs 21.95GiB of a device's 15.48GiB; try model.remat=full" in text
    assert "2.00 │ f32[32,4096,4096] │ backward: dot_general" in text
    assert "0.06 │ bf16[32,1048576]" in text
    fitting, refusal = json.loads((tmp_path / "plan.json").read_text())
    assert (fitting["fits"], refusal["fits"], refusal["target"]) == (True, False, "v5e:8")
    assert "does not fit: it needs" in (tmp_path / "plan.html").read_text()


def test_a_refusal_alone_is_a_page_too(monkeypatch, capsys, tmp_path):
    def compile_step(config, spec, cluster, *_):
        raise OutOfMemoryError(EARLY)

    html = tmp_path / "plan.html"
    code, text = planned(monkeypatch, capsys, compile_step, "--target", "v5e:8", "--html", str(html))
    assert code == command.DOES_NOT_FIT
    assert text.startswith("llama8b_5k on v5e:8 does not fit: it needs 61.69GiB of a device's 15.75GiB")
    assert "61.69GiB" in html.read_text()


def test_a_refusal_in_other_words_is_passed_on():
    error = OutOfMemoryError("RESOURCE_EXHAUSTED: too much\nof everything")
    assert str(error) == "RESOURCE_EXHAUSTED: too much"
    assert list(error.largest) == []


@pytest.mark.aot
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "a100-80gb:8", "mesh.fsdp=3"], 2, "is 3 devices, but there are 8 (NVIDIA A100-SXM4-80GB)"),
        (["--target", "a100-80gb:8", "model.attention=block_sparse"], 2, "it is for CPUs, and this is gpu"),
        (
            ["--target", "v5e:4", "--rows", "4096", "model.checkpoint=meta-llama/Llama-3.2-1B-Instruct"],
            command.DOES_NOT_FIT,
            "does not fit: it needs",
        ),
    ],
)
def test_the_real_compilers_refuse_in_one_message(arguments, code, message):
    """As a user starts it: nothing in the environment says what platform JAX is to use."""
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-m", "jaxguard.plan", *RUN, "model.remat=none", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert message in " ".join((done.stdout + done.stderr).split())
