"""Checkpoints: what is read back is what was written, whatever happened to the disk in between."""

import gc
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxguard.config.train import CheckpointConfig
from jaxguard.train import checkpoints as train_checkpoints
from jaxguard.train.checkpoints import (
    disk_steps,
    open_checkpoints,
    read_checkpoint_weights,
    read_description,
    write_checkpoint_weights,
)
from jaxguard.utils.errors import JaxguardError

# Orbax's other reads and writes of a damaged checkpoint or a full disk fail as well, unheard.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
checksum = jax.jit(train_checkpoints.checksum)
KEEP = CheckpointConfig(keep_last=2, keep_best=1)
OPTIMIZER = optax.chain(optax.identity(), optax.scale_by_adam())
CUTS = {"embed": P("tensor", "fsdp"), "layers.q_proj": P(None, "fsdp", "tensor"), "norm": P()}


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """What failed unheard is freed here, not in the middle of another test."""
    yield
    gc.collect()


def mesh_of(devices: int, tensor: int = 1) -> Mesh:
    shape = (1, devices // tensor, tensor)
    names = ("data", "fsdp", "tensor")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:devices])


def place(state: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Every leaf as a jax.Array on the mesh; the optimizer's moments are cut as the weights are."""

    def one(path: Any, leaf: Any) -> jax.Array:
        name = next((k.key for k in path if getattr(k, "key", None) in CUTS), None)
        return jax.device_put(leaf, NamedSharding(mesh, CUTS[name] if name else P()))

    return jax.tree.map_with_path(one, state)


def new_state(mesh: Mesh, width: int = 512) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"embed": (32, width), "layers.q_proj": (2, width, 8), "norm": (width,)}
    weights = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    moments = optax.ScaleByAdamState(
        np.int32(0), jax.tree.map(np.zeros_like, weights), jax.tree.map(np.zeros_like, weights)
    )
    return place({"weights": weights, "optimizer": (optax.EmptyState(), moments), "step": np.int32(0)}, mesh)


@jax.jit
def update(state: dict[str, Any]) -> dict[str, Any]:
    gradient = jax.tree.map(jnp.sin, state["weights"])
    change, optimizer = OPTIMIZER.update(gradient, state["optimizer"], state["weights"])
    weights = optax.apply_updates(state["weights"], change)
    return {"weights": weights, "optimizer": optimizer, "step": state["step"] + 1}


def abstract(state: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, x, y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path[0]


@pytest.fixture(scope="module")
def states() -> list[dict[str, Any]]:
    """The state after 0, 1, ... 6 steps on 4 x 2 devices."""
    found = [new_state(mesh_of(8, tensor=2))]
    for _ in range(6):
        found.append(update(found[-1]))
    return found


@pytest.fixture(scope="module")
def _written(tmp_path_factory: pytest.TempPathFactory, states: list[dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("written")
    with open_checkpoints(folder, KEEP, "tiny") as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, states[step], validation_loss=1.0)
    return folder


@pytest.fixture
def written(_written: Path, tmp_path: Path) -> Path:
    """A copy of a folder with checkpoints of steps 2 and 4."""
    return Path(shutil.copytree(_written, tmp_path / "checkpoints"))


def restored(folder: Path, like: dict[str, Any], fingerprint: str = "tiny") -> tuple[int, dict[str, Any]] | None:
    with open_checkpoints(folder, KEEP, fingerprint) as checkpoints:
        return checkpoints.restore(abstract(like))


def data_files(checkpoint: Path) -> list[Path]:
    """The files that hold the arrays' values."""
    return [p for p in checkpoint.rglob("ocdbt.process_0/d/*") if p.is_file()]


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_empty_folder_has_nothing_to_restore(tmp_path: Path, states: list[dict[str, Any]]) -> None:
    assert restored(tmp_path / "new", states[0]) is None


def test_restores_newest_bit_for_bit(written: Path, states: list[dict[str, Any]]) -> None:
    found = restored(written, states[0])
    assert found is not None
    step, state = found
    assert step == 4 == int(state["step"])
    assert_same(state, states[4])
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, states[4])


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_restores_on_another_mesh(written: Path, states: list[dict[str, Any]], devices: int) -> None:
    like = place(states[0], mesh_of(devices))
    found = restored(written, like)
    assert found is not None
    assert_same(found[1], states[4])
    assert all(len(leaf.sharding.device_set) == devices for leaf in jax.tree.leaves(found[1]))
    again = jax.tree.leaves(update(found[1])["weights"])  # what is restored can be trained on
    assert all(np.allclose(x, y, rtol=1e-6) for x, y in zip(again, jax.tree.leaves(states[5]["weights"]), strict=True))


def test_state_may_be_donated_right_after_save(tmp_path: Path) -> None:
    state = new_state(mesh_of(8), width=1024)
    donating = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    before = jax.tree.map(np.array, state)
    with open_checkpoints(tmp_path, KEEP, "tiny") as checkpoints:
        checkpoints.save(1, state)
        like = abstract(state)
        state = jax.block_until_ready(donating(state))
        found = checkpoints.restore(like)
    assert found is not None
    assert_same(found[1], before)


def test_keeps_last_and_best(tmp_path: Path, states: list[dict[str, Any]]) -> None:
    losses = {1: 0.9, 2: 0.2, 3: float("nan"), 4: 0.5, 5: None, 6: 0.6}
    for part in ((1, 2, 3), (4, 5, 6)):  # a new start must still know the best
        with open_checkpoints(tmp_path, KEEP, "tiny") as checkpoints:
            for step in part:
                checkpoints.save(step, states[step], losses[step])
    assert disk_steps(tmp_path) == [2, 5, 6]
    losses = {step: read_description(tmp_path / str(step))["validation_loss"] for step in disk_steps(tmp_path)}
    assert losses == {2: 0.2, 5: None, 6: 0.6}


def test_keep_best_zero_keeps_only_last(tmp_path: Path, states: list[dict[str, Any]]) -> None:
    with open_checkpoints(tmp_path, CheckpointConfig(keep_last=1, keep_best=0), "tiny") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, states[step], float(step))
    assert disk_steps(tmp_path) == [3]


def test_saving_a_step_again_changes_nothing(written: Path, states: list[dict[str, Any]]) -> None:
    with open_checkpoints(written, KEEP, "tiny") as checkpoints:
        checkpoints.save(4, states[0])
        found = checkpoints.restore(abstract(states[0]))
    assert found is not None
    assert_same(found[1], states[4])


def truncate(checkpoint: Path) -> None:
    for path in data_files(checkpoint):
        os.truncate(path, path.stat().st_size // 2)


def flip_data(checkpoint: Path) -> None:
    flip_bit(max(data_files(checkpoint / "weights"), key=lambda path: path.stat().st_size))


def flip_description(checkpoint: Path) -> None:
    path = checkpoint / "about" / "metadata"
    path.write_text(path.read_text().replace("tiny", "tinx"))


def lose_item(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "rest")


def lose_all(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def rename(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.with_name("9"))


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: "",
    flip_data: "changed on disk",  # our checksums; Orbax reads it without complaint
    flip_description: "its description changed on disk",
    lose_item: "",
    lose_all: "its description",
    rename: "it is named 9 but was saved at step 4",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_corrupt_newest_is_named_and_the_one_before_taken(
    written: Path, states: list[dict[str, Any]], damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(written / "4")
    bad = "9" if damage is rename else "4"
    with open_checkpoints(written, KEEP, "tiny") as checkpoints, caplog.at_level(logging.WARNING, "jaxguard"):
        found = checkpoints.restore(abstract(states[0]))
        assert found is not None
        assert found[0] == 2
        assert_same(found[1], states[2])
        assert re.search(f"the checkpoint {written / bad} is corrupt: .*{DAMAGES[damage]}", caplog.text)
        assert (written / f"{bad}.corrupt").is_dir()
        checkpoints.save(4, states[4])  # the step can be saved again
    assert restored(written, states[0])[0] == 4  # type: ignore[index]


def test_every_array_of_the_state_is_covered(written: Path, states: list[dict[str, Any]]) -> None:
    about = json.loads((written / "4" / "about" / "metadata").read_text())
    assert sum(len(arrays) for arrays in about["arrays"].values()) == len(jax.tree.leaves(states[4]))


def test_all_corrupt_is_an_error_and_nothing_is_moved(written: Path, states: list[dict[str, Any]]) -> None:
    for step in ("2", "4"):
        truncate(written / step)
    with pytest.raises(JaxguardError, match=r"every checkpoint .* corrupt \(4, 2\)"):
        restored(written, states[0])
    assert disk_steps(written) == [2, 4]


def test_another_fingerprint_is_an_error(written: Path, states: list[dict[str, Any]]) -> None:
    with pytest.raises(JaxguardError, match=r"tiny.*other"):
        restored(written, states[0], fingerprint="other")


def test_other_shapes_are_an_error_that_names_them(written: Path) -> None:
    with pytest.raises(JaxguardError, match=r"embed is \(\(32, 512\), .* there and \(\(32, 8\), .* here"):
        restored(written, new_state(mesh_of(8), width=8))


def test_leftovers_of_a_killed_save_are_removed(written: Path, states: list[dict[str, Any]]) -> None:
    left = written / "5.orbax-checkpoint-tmp"
    shutil.copytree(written / "4", left)
    with open_checkpoints(written, KEEP, "tiny") as checkpoints:
        assert checkpoints.restore(abstract(states[0]))[0] == 4  # type: ignore[index]
        checkpoints.save(5, states[5])
    assert sorted(p.name for p in written.iterdir()) == ["2", "4", "5"]  # 2 is the best


def test_save_under_way_is_finished_when_an_error_passes(tmp_path: Path, states: list[dict[str, Any]]) -> None:
    def fail() -> None:
        with open_checkpoints(tmp_path, KEEP, "tiny") as checkpoints:
            checkpoints.save(1, states[1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert restored(tmp_path, states[0])[0] == 1  # type: ignore[index]


@pytest.mark.parametrize("where", ["", "checkpoints"])
def test_weights_alone(written: Path, states: list[dict[str, Any]], where: str) -> None:
    weights = read_checkpoint_weights(written.parent / where)
    assert_same(weights, states[4]["weights"])
    assert all(len(w.sharding.device_set) == 1 for w in weights.values())


def test_weights_alone_on_a_mesh_and_of_a_step(written: Path, states: list[dict[str, Any]]) -> None:
    shardings = {k: v.sharding for k, v in place(states[0], mesh_of(4))["weights"].items()}
    weights = read_checkpoint_weights(written, shardings, step=2)
    assert_same(weights, states[2]["weights"])
    assert {k: w.sharding for k, w in weights.items()} == shardings


def test_weights_alone_falls_back_without_touching_the_folder(written: Path, states: list[dict[str, Any]]) -> None:
    flip_data(written / "4")
    assert_same(read_checkpoint_weights(written), states[2]["weights"])
    assert disk_steps(written) == [2, 4]
    with pytest.raises(JaxguardError, match=r"corrupt \(4\)"):
        read_checkpoint_weights(written, step=4)


def test_missing_weights_are_named(written: Path, tmp_path: Path) -> None:
    with pytest.raises(JaxguardError, match="no checkpoint of step 3; it has 2, 4"):
        read_checkpoint_weights(written, step=3)
    with pytest.raises(JaxguardError, match="holds no checkpoint"):
        read_checkpoint_weights(tmp_path / "nowhere")
    with pytest.raises(JaxguardError, match="norm is only in the checkpoint"):
        read_checkpoint_weights(written, {k: NamedSharding(mesh_of(1), P()) for k in ("embed", "layers.q_proj")})


def test_weights_written_alone_are_read_back(tmp_path: Path, states: list[dict[str, Any]]) -> None:
    write_checkpoint_weights(tmp_path / "flax", states[3]["weights"])
    assert_same(read_checkpoint_weights(tmp_path / "flax"), states[3]["weights"])


@given(st.integers(0, 2**32 - 1), st.sampled_from(["float32", "int32", "bfloat16", "uint8"]))
def test_checksum_sees_any_element_and_any_swap(seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    x = np.array(jnp.asarray(rng.integers(0, 2, (5, 3)), dtype))
    base = int(checksum(jnp.asarray(x)))
    where, other = rng.choice(x.size, 2, replace=False)
    changed = x.copy()
    changed.flat[where] = 1 - changed.flat[where]
    assert int(checksum(jnp.asarray(changed))) != base
    swapped = x.copy()
    swapped.flat[where], swapped.flat[other] = x.flat[other], x.flat[where]
    assert (int(checksum(jnp.asarray(swapped))) == base) == (x.flat[where] == x.flat[other])


def test_checksum_does_not_depend_on_the_mesh(states: list[dict[str, Any]]) -> None:
    for devices in (8, 4, 1):
        for name, weight in place(states[1], mesh_of(devices))["weights"].items():
            assert int(checksum(weight)) == int(checksum(jnp.asarray(np.asarray(states[1]["weights"][name]))))


WRITER = """
import sys
from pathlib import Path
import jax
import numpy as np
from jaxguard.config.train import CheckpointConfig
from jaxguard.train.checkpoints import open_checkpoints

def state(step):
    noise = np.random.default_rng(step).normal(size=(512, 512)).astype(np.float32)
    tree = {"weights": {"embed": noise}, "optimizer": noise[0], "step": np.int32(step)}
    return jax.device_put(tree, jax.devices()[0])

if __name__ == "__main__":
    with open_checkpoints(Path(sys.argv[1]), CheckpointConfig(keep_last=2, keep_best=1), "tiny") as checkpoints:
        found = checkpoints.restore(state(0))
        step = found[0] if found else 0
        print(step, flush=True)
        while True:
            step += 1
            checkpoints.wait()
            print(step, flush=True)  # all before are on disk, this one begins
            checkpoints.save(step, state(step), 1.0 / step)
"""


def test_kill_at_any_moment_loses_nothing_before(tmp_path: Path) -> None:
    script, folder = tmp_path / "writer.py", tmp_path / "checkpoints"
    script.write_text(WRITER)
    rng, reached = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        begun = int(process.stdout.readline())
        assert begun == reached
        until = begun + rng.randint(2, 5)
        while begun < until:
            begun = int(process.stdout.readline())
        time.sleep(rng.random() * 0.1)  # somewhere within this save or the next ones
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        begun = max([begun, *map(int, rest.split())])
        reached = disk_steps(folder)[-1]
        assert begun - 1 <= reached <= begun
        assert read_description(folder / str(reached))["validation_loss"] == 1.0 / reached
    make: dict[str, Any] = {"__name__": "writer"}
    exec(WRITER, make)
    found = restored(folder, make["state"](0))
    assert found is not None
    assert found[0] == reached
    assert_same(found[1], make["state"](reached))


def test_full_disk_keeps_earlier_checkpoints(tmp_path: Path) -> None:
    small, large = new_state(mesh_of(1)), new_state(mesh_of(1), width=2048)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        with open_checkpoints(tmp_path, KEEP, "tiny") as checkpoints:
            checkpoints.save(1, small)
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
            checkpoints.save(2, large)

    try:
        with pytest.raises(JaxguardError, match=r"step 2 .*last one on disk is step 1"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert disk_steps(tmp_path) == [1]
    assert restored(tmp_path, small)[0] == 1  # type: ignore[index]
