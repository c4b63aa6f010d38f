"""Reading and exporting: every byte where it belongs, on any mesh and over several hosts."""

import itertools
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_checkpoints import BF16, VISION, hashes, hf, write_shards

from jaxguard.models.hf_io import checkpoints as checkpoint_io
from jaxguard.models.hf_io import safetensors as safetensors_io
from jaxguard.models.hf_io.checkpoints import ExportReport, export_hf, read_piece, read_weights
from jaxguard.models.hf_io.safetensors import open_file, open_folder
from jaxguard.models.spec import read_spec
from jaxguard.models.weights import table
from jaxguard.utils.errors import JaxguardError

KINDS = {
    "single": {"family": "llama"},
    "sharded": {"family": "llama", "shards": 3},
    "tied": {"family": "llama", "tie_word_embeddings": True},
    "tied with a stored head": {"family": "llama", "tie_word_embeddings": True, "extra": {"lm_head.weight": (512, 32)}},
    "tied with another head": {"family": "llama", "tie_word_embeddings": True, "extra": {"lm_head.weight": (512, 32)}},
    "fp32": {"family": "llama", "dtype": np.dtype(np.float32)},
    "fp16": {"family": "llama", "dtype": np.dtype(np.float16)},
    "gemma3 text": {"family": "gemma3"},
    "qwen3": {"family": "qwen3", "shards": 2},
    "qwen3 tied": {"family": "qwen3", "tie_word_embeddings": True},
    "multimodal": {"family": "multimodal", "shards": 2},
    "multimodal, prefix of memory": {"family": "multimodal", "prefix": "model.language_model."},
    "multimodal, untied": {"family": "multimodal", "tie_word_embeddings": False},
}


@pytest.fixture(params=KINDS)
def any_kind(request, make) -> Path:
    folder = make(**KINDS[request.param])
    if request.param == "tied with a stored head":  # as such checkpoints hold it: the embedding again
        tensors = hf(folder)
        write_shards(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, 1)
    return folder


@pytest.fixture(params=["host", "accelerators"])
def onto(request, monkeypatch):
    """Where weights go. The devices are this host's in both cases; in one they are filled as if they were not."""
    if request.param == "accelerators":
        monkeypatch.setattr(checkpoint_io, "in_host_memory", lambda sharding: False)


@pytest.mark.usefixtures("onto")
def test_read_gives_the_layouts_of_the_table(any_kind):
    spec = read_spec(any_kind)
    weights, theirs = read_weights(any_kind, spec), hf(any_kind)
    prefix = next(n for n in theirs if n.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
    d, n, k, h = spec.d_model, spec.num_heads, spec.num_kv_heads, spec.head_dim
    assert set(weights) == {w.path for w in table(spec)}
    assert all(w.dtype == jnp.float32 for w in weights.values())
    np.testing.assert_array_equal(weights["embed"], theirs[f"{prefix}embed_tokens.weight"].astype(np.float32))
    for i in range(spec.num_layers):
        layer = {name.removeprefix(f"{prefix}layers.{i}."): w.astype(np.float32) for name, w in theirs.items()}
        q, k_, o = (layer[f"self_attn.{x}_proj.weight"] for x in "qko")
        np.testing.assert_array_equal(weights["layers.q_proj"][i], q.T.reshape(d, n, h))
        np.testing.assert_array_equal(weights["layers.k_proj"][i], k_.T.reshape(d, k, h))
        np.testing.assert_array_equal(weights["layers.o_proj"][i], o.T.reshape(n, h, d))
        np.testing.assert_array_equal(weights["layers.up_proj"][i], layer["mlp.up_proj.weight"].T)
        np.testing.assert_array_equal(weights["layers.attention_norm"][i], layer["input_layernorm.weight"])


def test_identity_export_is_byte_identical(any_kind, tmp_path):
    report = export_hf(read_weights(any_kind, read_spec(any_kind)), any_kind, tmp_path / "out")
    wanted = hashes(any_kind)
    del wanted["README.md"]
    assert hashes(tmp_path / "out") == wanted
    assert report.changed == 0
    assert report.changed_fraction == 0.0
    assert report.tensors + report.carried == len(open_folder(any_kind))


def test_an_export_takes_over_neither_code_nor_pickles(make, tmp_path):
    source = make("llama")
    before = hashes(source)
    for name in (
        "modeling_own.py",
        "tokenizer.pkl",
        "optimizer.pt",
        "training_args.bin",
        "LICENSE.py",
        ".env",
        "run.sh",
        "x.so",
    ):
        (source / name).write_bytes(b"x")
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("{{ messages }}", encoding="utf-8")
    (templates / "run.py").write_text("x", encoding="utf-8")
    export_hf(read_weights(source, read_spec(source)), source, tmp_path / "out")
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert written == (set(before) - {"README.md"}) | {"additional_chat_templates/tool.jinja"}


def test_an_export_follows_no_link_out_of_the_checkpoint(make, tmp_path):
    source, secret = make("llama"), tmp_path / "secret.json"
    secret.write_text("{}", encoding="utf-8")
    weights = read_weights(source, read_spec(source))
    (source / "keys.json").symlink_to(secret)
    with pytest.raises(JaxguardError, match=r"keys\.json.*secret\.json"):
        export_hf(weights, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (source / "keys.json").unlink()
    (source / "README.md").unlink(missing_ok=True)
    (source / "README.md").symlink_to(secret)
    with pytest.raises(JaxguardError, match=r"README\.md.*secret\.json"):
        export_hf(weights, source, tmp_path / "out")
    (source / "README.md").unlink()
    (source / "additional_chat_templates").symlink_to(tmp_path)
    (tmp_path / "own.jinja").write_text("x", encoding="utf-8")
    with pytest.raises(JaxguardError, match=r"own\.jinja"):
        export_hf(weights, source, tmp_path / "out")


def test_the_links_of_the_hubs_cache_are_files(make, tmp_path):
    source, blobs = make("llama"), tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    shutil.copytree(source, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    export_hf(read_weights(snapshot, read_spec(snapshot)), snapshot, tmp_path / "out")
    assert hashes(tmp_path / "out") == {name: h for name, h in hashes(source).items() if name != "README.md"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_one_changed_weight_changes_only_its_bytes(make, tmp_path):
    source = make("multimodal", shards=2)
    weights = read_weights(source, read_spec(source))
    weights["layers.v_proj"] = weights["layers.v_proj"].at[3].multiply(2.0)
    report = export_hf(weights, source, tmp_path / "out")
    name = "language_model.model.layers.3.self_attn.v_proj.weight"
    place = open_folder(source)[name]
    for path in source.glob("*.safetensors"):
        before = np.frombuffer(path.read_bytes(), np.uint8)
        after = np.frombuffer((tmp_path / "out" / path.name).read_bytes(), np.uint8)
        differing = np.flatnonzero(before != after)
        if path == place.file:
            assert len(differing) > 0
            assert differing.min() >= place.start
            assert differing.max() < place.stop
        else:
            assert len(differing) == 0
    np.testing.assert_array_equal(hf(tmp_path / "out")[name], hf(source)[name] * BF16.type(2))
    assert report.changed == hf(source)[name].size
    assert report.carried == len(VISION)


def test_after_training_everything_trained_is_new_and_the_rest_is_not(any_kind, tmp_path):
    spec = read_spec(any_kind)
    weights = {path: w * 2 + 1 for path, w in read_weights(any_kind, spec).items()}
    report = export_hf(weights, any_kind, tmp_path / "out")
    assert report.changed_fraction > 0.95  # 2x + 1 = x for x near -1, in few bits
    again = read_weights(tmp_path / "out", spec)
    before, after = open_folder(any_kind), open_folder(tmp_path / "out")
    kinds = {tensor.dtype for tensor in after.values()}
    for path, w in weights.items():
        np.testing.assert_array_equal(again[path], np.asarray(w).astype(min(kinds, key=lambda d: d.itemsize)))
    assert [(t.name, t.start, t.stop, t.kind) for t in before.values()] == [
        (t.name, t.start, t.stop, t.kind) for t in after.values()
    ]
    for name in before:
        carried = name.startswith(("vision_tower", "multi_modal"))
        assert carried == np.array_equal(before[name].view(), after[name].view())
    if spec.tied and "lm_head.weight" in after:
        np.testing.assert_array_equal(after["lm_head.weight"].view(), after["model.embed_tokens.weight"].view())


def test_tensors_that_threads_share_in_parts_come_out_whole(any_kind, tmp_path, monkeypatch):
    spec = read_spec(any_kind)
    read = read_weights(any_kind, spec)
    weights = {path: w * 2 + 1 for path, w in read.items()}
    whole = export_hf(weights, any_kind, tmp_path / "whole")
    monkeypatch.setattr(safetensors_io, "BLOCK", 1)
    monkeypatch.setattr(safetensors_io, "BAND", 5)
    assert export_hf(weights, any_kind, tmp_path / "parts") == whole
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")
    for path, w in read_weights(any_kind, spec).items():
        np.testing.assert_array_equal(w, read[path])


def shardings(spec, shape: tuple[int, int, int]) -> dict[str, NamedSharding]:
    """Width over fsdp, heads and hidden units over tensor, data replicated."""
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    axes = {"D": "fsdp", "F": "tensor", "K": "tensor", "N": "tensor"}
    found = {}
    for w in table(spec):
        letters = (["L"] if w.stacked else []) + w.rule.split("->")[1].split()
        found[w.path] = NamedSharding(mesh, PartitionSpec(*(axes.get(x) for x in letters)))
    return found


@pytest.mark.parametrize("mesh", [None, (1, 8, 1)])
def test_the_host_and_several_devices_round_to_nearest_even(make, tmp_path, mesh):
    source = make("llama")
    spec = read_spec(source)
    weights = read_weights(source, spec, mesh and shardings(spec, mesh))
    half = 2.0**-8  # half a bf16 step above 1
    given = jnp.asarray([1 + half, 1 + 3 * half, 1 + half + 2.0**-20, -1 - half], jnp.float32)
    weights["final_norm"] = weights["final_norm"].at[:4].set(given)
    export_hf(weights, source, tmp_path / "out")
    stored = hf(tmp_path / "out")["model.norm.weight"][:4].astype(np.float32)
    assert stored.tolist() == [1.0, 1 + 4 * half, 1 + 2 * half, -1.0]


@pytest.mark.usefixtures("onto")
@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (1, 4, 2)])
@pytest.mark.parametrize("family", ["llama", "multimodal"])
def test_sharded_read_and_export_equal_the_unsharded(make, tmp_path, family, mesh):
    source = make(family, shards=2)
    spec = read_spec(source)
    whole, places = read_weights(source, spec), shardings(spec, mesh)
    cut = read_weights(source, spec, places)
    for path, w in cut.items():
        assert w.sharding == places[path]
        np.testing.assert_array_equal(w, whole[path])
    export_hf(cut, source, tmp_path / "out")
    assert all(hashes(source)[name] == digest for name, digest in hashes(tmp_path / "out").items())


@pytest.mark.usefixtures("onto")
def test_each_shard_is_read_once_and_alone(make, monkeypatch):
    source = make("llama")
    spec = read_spec(source)
    read: list[tuple[str, int]] = []

    def spy(weight, *args):
        piece = read_piece(weight, *args)
        read.append((weight.path, piece.size))
        return piece

    monkeypatch.setattr(checkpoint_io, "read_piece", spy)
    weights = read_weights(source, spec, shardings(spec, (2, 2, 2)))
    stacked = {w.path: w.stacked for w in table(spec)}
    for path, w in weights.items():
        layers = spec.num_layers if stacked[path] else 1
        distinct = {str(shard.index) for shard in w.addressable_shards}
        assert [size for p, size in read if p == path] == [w.addressable_shards[0].data.size // layers] * (
            len(distinct) * layers
        )


def test_what_the_host_has_filled_is_taken_over_without_a_copy(make, monkeypatch):
    source, filled, space = make("llama"), [], checkpoint_io.allocate
    monkeypatch.setattr(checkpoint_io, "allocate", lambda *args: filled.append(space(*args)) or filled[-1])
    weights = read_weights(source, read_spec(source))
    assert {w.unsafe_buffer_pointer() for w in weights.values()} == {space.ctypes.data for space in filled}


@pytest.mark.usefixtures("onto")
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)])
def test_what_was_read_is_no_part_of_the_file(make, dtype):
    source = make("llama", dtype=dtype)
    weights = read_weights(source, read_spec(source))
    before = {path: np.array(w) for path, w in weights.items()}
    file = source / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    for path, w in weights.items():
        np.testing.assert_array_equal(w, before[path])


@pytest.mark.usefixtures("onto")
def test_subnormal_values_survive(make, tmp_path):
    source = make("llama", dtype=np.dtype(np.float32))
    tensor = open_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    with tensor.file.open("r+b") as opened:
        opened.seek(tensor.start)
        opened.write(np.float32([1e-40, -1e-44, 0.0, -0.0]).tobytes())
    export_hf(read_weights(source, read_spec(source)), source, tmp_path / "out")
    assert hashes(tmp_path / "out")["model.safetensors"] == hashes(source)["model.safetensors"]


@pytest.mark.usefixtures("onto")
def test_dtype_of_matrices_in_memory_can_be_chosen(make):
    source = make("gemma3")
    for path, weight in read_weights(source, read_spec(source), dtype=jnp.bfloat16).items():
        assert weight.dtype == (np.float32 if "norm" in path else BF16)


def test_report_says_what_share_changed():
    assert ExportReport(tensors=1, carried=0, values=200, changed=50, dtypes=("BF16",)).changed_fraction == 0.25


# The real loader.


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_transformers_loads_the_export(make, tmp_path, family):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    source = make(family, shards=2)
    weights = read_weights(source, read_spec(source))
    export_hf(weights | {"final_norm": weights["final_norm"] * 2}, source, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    parameters = dict(model.named_parameters())
    want = hf(tmp_path / "out")
    assert torch.equal(
        parameters["model.norm.weight"].float(), torch.tensor(want["model.norm.weight"].astype(np.float32))
    )


def test_transformers_loads_a_multimodal_export(make, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = make("multimodal")
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    real = {on_disk(name): tuple(p.shape) for name, p in model.named_parameters() if "language_model" not in name}
    text = {name: w for name, w in hf(folder).items() if name.startswith("language_model")}
    random = np.random.default_rng(0)
    write_shards(folder, text | {n: random.standard_normal(s).astype(BF16) for n, s in real.items()}, 1)
    weights = read_weights(folder, read_spec(folder))
    export_hf({k: w * 2 for k, w in weights.items()}, folder, tmp_path / "out")
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    want = hf(tmp_path / "out")
    for name, parameter in model.named_parameters():
        if "lm_head" not in name:
            np.testing.assert_array_equal(parameter.detach().float().numpy(), want[on_disk(name)].astype(np.float32))


def on_disk(name: str) -> str:
    """A multimodal Gemma 3's name in memory (transformers 5) -> the one on the hub."""
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


TWO_HOSTS = """
import sys, jax
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec
source, output, port, process = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
from jaxguard.models.hf_io import checkpoints as checkpoint_io
from jaxguard.models.spec import read_spec
from jaxguard.models.weights import table
read, sizes = checkpoint_io.read_piece, []
checkpoint_io.read_piece = lambda *args: sizes.append((piece := read(*args)).size) or piece
spec, mesh = read_spec(Path(source)), jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
letters = {w.path: (["L"] if w.stacked else []) + w.rule.split("->")[1].split() for w in table(spec)}
places = {
    path: NamedSharding(mesh, PartitionSpec(*("fsdp" if letter == "D" else None for letter in own)))
    for path, own in letters.items()
}
weights = checkpoint_io.read_weights(Path(source), spec, places)
assert 2 * sum(sizes) == sum(w.size for w in weights.values()), "each host reads its half"
weights["final_norm"] = weights["final_norm"] * 2
assert checkpoint_io.export_hf(weights, Path(source), Path(output)).changed == 32
"""


@pytest.mark.slow
def test_two_hosts_read_their_halves_and_write_one_folder(make, tmp_path):
    source = make("llama", shards=2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", TWO_HOSTS, str(source), str(tmp_path / "out"), str(port)]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    hosts = [
        subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    errors = [host.communicate(timeout=300)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], errors
    before, after = hf(source), hf(tmp_path / "out")
    assert [name for name in before if not np.array_equal(before[name], after[name])] == ["model.norm.weight"]
    np.testing.assert_array_equal(after["model.norm.weight"], before["model.norm.weight"] * BF16.type(2))


def test_header_is_read_in_order(make):
    source = make("llama")
    tensors = list(open_file(source / "model.safetensors").values())
    assert all(a.stop == b.start for a, b in itertools.pairwise(tensors))
    assert tensors[-1].stop == (source / "model.safetensors").stat().st_size
