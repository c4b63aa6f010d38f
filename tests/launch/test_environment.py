"""launch/env and launch/docker: files that the shell, docker and kubectl read alike, with flags that XLA knows."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("cpu", "gpu", "tpu")
DOCKERFILE = (ROOT / "launch/docker/Dockerfile").read_text(encoding="utf-8")


def lines(target):
    return (ROOT / f"launch/env/{target}.env").read_text(encoding="utf-8").splitlines()


def settings(target):
    return dict(line.split("=", 1) for line in lines(target) if line and not line.startswith("#"))


def start_jax(**environment):
    """XLA reads its flags when a backend starts, and ends the process at one that it does not know."""
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("target", TARGETS)
def test_each_setting_is_plain_and_has_its_reason_and_source(target):
    """docker and kubectl take a line as it is: quotes would become part of the value."""
    assert sorted(path.stem for path in (ROOT / "launch/env").iterdir()) == list(TARGETS)
    paragraphs = "\n".join(lines(target)).split("\n\n")[1:]
    assert len(paragraphs) == len(settings(target)) > 0
    for paragraph in paragraphs:
        *reason, setting = paragraph.splitlines()
        assert reason
        assert all(line.startswith("# ") for line in reason), paragraph
        assert re.search(r"https://|xla/", " ".join(reason)), paragraph
        assert re.fullmatch(r"[A-Z_]+=[\w.,/=-]+", setting), paragraph


@pytest.mark.parametrize(
    ("target", "first", "device"), [("gpu", "cuda", "/dev/nvidia0"), ("tpu", "tpu", "/dev/accel0")]
)
def test_without_its_hardware_a_target_does_not_go_on_with_the_cpu(target, first, device):
    platforms = settings(target)["JAX_PLATFORMS"]
    assert platforms.split(",")[0] == first
    if not Path(device).exists():
        assert start_jax(JAX_PLATFORMS=platforms).returncode != 0


@pytest.mark.parametrize("target", [target for target in TARGETS if "XLA_FLAGS" in settings(target)])
def test_xla_knows_the_flags(target):
    flags = settings(target)["XLA_FLAGS"]
    assert start_jax(XLA_FLAGS=flags).returncode == 0
    misspelt = start_jax(XLA_FLAGS=flags.replace("=", "s=", 1))
    assert misspelt.returncode != 0
    assert "Unknown flag" in misspelt.stderr


def test_an_image_has_an_extra_for_each_target():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for target in TARGETS:
        assert target in extras
        assert bool(extras[target]) == (ROOT / f"constraints/{target}.txt").is_file()


def test_an_image_is_installed_from_the_lock_and_nothing_else():
    installs = re.findall(r"pip install [^;&\n]*", DOCKERFILE)
    assert len(installs) == 2
    assert "--require-hashes --no-deps --requirement" in installs[0]
    assert "--no-deps --no-build-isolation ." in installs[1]
    assert re.search(r"^ARG PYTHON_DIGEST$", DOCKERFILE, re.MULTILINE), "it has no default: the build fails without one"


def test_an_image_is_made_of_what_docker_is_given():
    ignored = (ROOT / "launch/docker/Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    included = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()}
    assert copied == included
    assert all((ROOT / name).exists() for name in copied)


def test_an_image_runs_as_a_user_who_can_write_its_runs():
    assert re.search(r"^FROM python:3\.\d+\.\d+-slim-\w+@sha256:\$\{PYTHON_DIGEST\}$", DOCKERFILE, re.MULTILINE)
    (user,) = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert int(user) > 0
    assert f"--uid {user} " in DOCKERFILE
    assert f"install --directory --owner={user} runs" in DOCKERFILE
