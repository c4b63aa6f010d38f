"""Bad checkpoints and full disks: each is explained, and nothing half done stays."""

import contextlib
import errno
import json
import math
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from small_checkpoints import BF16, hashes, hf, write_shards

from jaxguard.models.hf_io import checkpoints as checkpoint_io
from jaxguard.models.hf_io.checkpoints import export_hf, read_weights
from jaxguard.models.spec import read_spec
from jaxguard.utils.errors import JaxguardError


def change(folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = hf(folder)
    edit(tensors)
    write_shards(folder, tensors, 1)


def cut_short(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-10])


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def edit_index(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        edit(index)
        path.write_text(json.dumps(index))

    return apply


Q = "model.layers.1.self_attn.q_proj.weight"

MISTAKES = {
    "missing": (1, lambda f: change(f, lambda t: t.pop(Q)), rf"lacks the tensor '{Q}'"),
    "extra": (
        1,
        lambda f: change(f, lambda t: t.update({"model.layers.7.x.weight": t[Q]})),
        r"'model.layers.7.x.weight'",
    ),
    "misshapen": (1, lambda f: change(f, lambda t: t.update({Q: t[Q][:, :-1].copy()})), r"\(32, 31\).*\(32, 32\)"),
    "quantised": (1, lambda f: change(f, lambda t: t.update({Q: t[Q].astype(np.int8)})), r"stored as I8.*[Qq]uantised"),
    "fp8": (
        1,
        lambda f: change(f, lambda t: t.update({Q: t[Q].astype(ml_dtypes.float8_e4m3fn)})),
        r"stored as F8_E4M3",
    ),
    "no embedding": (1, lambda f: change(f, lambda t: t.pop("model.embed_tokens.weight")), r"no embedding table"),
    "truncated": (1, cut_short, r"model\.safetensors is truncated or not a safetensors"),
    "truncated shard": (2, cut_short, r"model-00001-of-00002\.safetensors is truncated"),
    "not safetensors": (1, lambda f: (f / "model.safetensors").write_bytes(b"<html>"), r"not a safetensors file"),
    "empty file": (1, lambda f: (f / "model.safetensors").write_bytes(b""), r"truncated"),
    "absent shard": (2, lambda f: (f / "model-00002-of-00002.safetensors").unlink(), r"names the file.*00002.*absent"),
    "corrupt index": (2, lambda f: (f / "model.safetensors.index.json").write_text("{"), r"index\.json: not JSON"),
    "index without map": (2, edit_index(lambda i: i.pop("weight_map")), r"index\.json: .*weight_map"),
    "index leads outside": (
        2,
        edit_index(lambda i: i["weight_map"].update({Q: "../x.safetensors"})),
        r"index\.json: weight_map.*slash",
    ),
    "index disagrees": (2, edit_index(lambda i: i["weight_map"].update(phantom=i["weight_map"][Q])), r"'phantom'"),
    "pickle": (1, as_pickle, r"PyTorch pickles but no safetensors"),
    "nothing": (1, lambda f: (f / "model.safetensors").unlink(), r"no weights to read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_checkpoints_are_explained(make, mistake):
    shards, spoil, message = MISTAKES[mistake]
    source = make("llama", shards=shards)
    spec = read_spec(source)
    spoil(source)
    with pytest.raises(JaxguardError, match=message):
        read_weights(source, spec)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)])
@pytest.mark.parametrize("on_host", [True, False])
def test_weights_that_are_not_finite_are_refused_by_name(make, monkeypatch, value, dtype, on_host):
    monkeypatch.setattr(checkpoint_io, "in_host_memory", lambda sharding: on_host)
    source = make("llama", dtype=dtype)
    change(source, lambda tensors: tensors[Q].__setitem__((3, 5), value))
    with pytest.raises(JaxguardError, match=rf"model\.safetensors.*'{Q}'.*not finite"):
        read_weights(source, read_spec(source))


def test_unsupported_architecture(make):
    source = make("llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    with pytest.raises(JaxguardError, match=r"'mistral' is not supported; supported: llama"):
        read_spec(source)


def test_weights_of_another_model(make, tmp_path):
    source = make("llama")
    weights = read_weights(source, read_spec(source))
    with pytest.raises(JaxguardError, match=r"another model.*lm_head"):
        export_hf({k: w for k, w in weights.items() if k != "lm_head"}, source, tmp_path / "out")
    with pytest.raises(JaxguardError, match=r"'final_norm' has shape \(31,\).*another model"):
        export_hf(weights | {"final_norm": weights["final_norm"][:-1]}, source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("dtype", "value"), [(BF16, math.nan), (np.dtype(np.float16), 7e4)])
def test_values_that_cannot_be_stored(make, tmp_path, dtype, value):
    source = make("llama", dtype=dtype)
    weights = read_weights(source, read_spec(source))
    with pytest.raises(JaxguardError, match=r"'model.norm.weight' has values that are not finite"):
        export_hf(weights | {"final_norm": weights["final_norm"].at[0].set(value)}, source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_occupied_output(make, tmp_path):
    source = make("llama")
    weights = read_weights(source, read_spec(source))
    (tmp_path / "out").mkdir()
    export_hf(weights, source, tmp_path / "out")  # empty: fine
    before = hashes(tmp_path / "out")
    with pytest.raises(JaxguardError, match=r"exists and is not empty"):
        export_hf(weights, source, tmp_path / "out")
    assert hashes(tmp_path / "out") == before
    with pytest.raises(JaxguardError, match=r"config.json.*out"):
        export_hf(weights, source, source / "config.json" / "out")


@contextlib.contextmanager
def small_files_only() -> Iterator[None]:
    """No file may grow past 64 KiB: the system itself refuses a write, much as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_nothing(make, tmp_path):
    source = make("llama")
    weights = read_weights(source, read_spec(source))
    with small_files_only(), pytest.raises(JaxguardError, match=r"the disk is full"):
        export_hf(weights, source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_full_disk_is_refused_before_anything_is_copied(make, tmp_path, monkeypatch):
    source = make("llama")
    weights = read_weights(source, read_spec(source))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(shutil, "copyfile", None)
    with pytest.raises(JaxguardError, match=r"space for .*out"):
        export_hf(weights, source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_disk_filled_while_writing(make, tmp_path, monkeypatch):
    source = make("llama")
    weights = {k: w + 1 for k, w in read_weights(source, read_spec(source)).items()}

    def write(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_io, "write_rows", write)
    with pytest.raises(JaxguardError, match=r"the disk is full"):
        export_hf(weights, source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
