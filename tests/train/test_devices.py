"""FLOPs against counts made another way, bytes per device."""

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxguard.config.train import MeshConfig
from jaxguard.models.sharding import make_mesh, weight_shardings
from jaxguard.models.spec import LayerKind, Rope, Spec
from jaxguard.models.weights import abstract, table
from jaxguard.train.startup import list_weights
from jaxguard.train.step import attended_pairs, training_flops

SPEC = Spec(
    family="gemma3", vocab_size=64, d_model=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32, norm_eps=1e-6,
    zero_centered_norm=True, post_norm=True, qk_norm=True, activation="gelu_tanh", query_scale=0.35, embed_scale=4.0,
    kinds=(LayerKind(Rope(1e4), 5), LayerKind(Rope(1e6))), layer_kinds=(0, 0, 1), tied=True,
    max_position_embeddings=64, dtype="float32",
)  # fmt: skip


@given(st.lists(st.integers(0, 12), max_size=4), st.none() | st.integers(1, 8))
def test_attended_pairs_are_the_masks_sum(lengths: list[int], window: int | None) -> None:
    expected = 0
    positions = np.concatenate([np.arange(0), *map(np.arange, lengths)])
    for length in lengths:
        query, key = np.indices((length, length))
        mask = (key <= query) & (query - key < (window or length))
        expected += int(mask.sum())
    assert attended_pairs(positions, window) == expected


def test_layer_and_head_flops_are_six_per_weight_and_token() -> None:
    without_pairs = (
        training_flops(SPEC, np.zeros(10, int), 4) - 3 * 4 * SPEC.num_heads * SPEC.head_dim * 10 * SPEC.num_layers
    )
    weights = {path: w for path, w in abstract(SPEC).items() if "norm" not in path}
    layers = sum(np.prod(w.shape) for path, w in weights.items() if path.startswith("layers."))
    assert without_pairs == 6 * (layers * 10 + SPEC.vocab_size * SPEC.d_model * 4)


def test_local_layers_attend_to_their_window_only() -> None:
    with_attention = training_flops(SPEC, np.arange(20), 0) - training_flops(SPEC, np.zeros(20, int), 0)
    pairs = 2 * (attended_pairs(np.arange(20), 5) - 20) + (attended_pairs(np.arange(20)) - 20)
    assert with_attention == 3 * 4 * SPEC.num_heads * SPEC.head_dim * pairs


def test_listed_weights_count_what_a_device_really_holds() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shardings = weight_shardings(SPEC, mesh)
    weights = {
        path: jax.device_put(np.zeros(w.shape, np.float32), shardings[path]) for path, w in abstract(SPEC).items()
    }
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in weights.items()}
    text = list_weights(SPEC, shapes)
    held = sum(w.addressable_shards[0].data.nbytes for w in weights.values())
    assert f"{sum(w.size for w in weights.values()):,} parameters" in text
    assert f"{held / 1024:,.1f} KiB" in text
    assert f"{3 * held / 1024:,.1f} KiB" in text
    for row in table(SPEC):
        line = next(line for line in text.splitlines() if row.path in line)
        assert " ".join(row.axes) in line
        cut = weights[row.path].addressable_shards[0].data.nbytes
        assert (f"{cut:,} B" if cut < 1024 else f"{cut / 1024:,.1f} KiB") in line
    assert shardings["embed"].spec != P()
