"""Rows that are rounded, compared and written in bands: as if all of them were rounded at once."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxguard.models.hf_io.safetensors import BAND, DTYPES, cast_tiles, open_file, write_rows
from jaxguard.utils.errors import JaxguardError

ROWS, COLUMNS = 2 * BAND + 3, 259
"""Neither whole bands nor whole tiles."""

TRANSPOSED = pytest.mark.parametrize("transposed", [False, True])
KINDS = pytest.mark.parametrize("kind", DTYPES)


@pytest.fixture
def values(transposed):
    found = np.random.default_rng(0).standard_normal((COLUMNS, ROWS) if transposed else (ROWS, COLUMNS), np.float32)
    return found.T if transposed else found


@pytest.fixture
def stored(tmp_path, kind):
    path = tmp_path / "zeros.safetensors"
    shapes = {"a": (3,), "matrix": (ROWS, COLUMNS), "z": (5,)}
    save_file({name: np.zeros(shape, DTYPES[kind]) for name, shape in shapes.items()}, path)
    return open_file(path)


def written(stored, tmp_path: Path, *parts: tuple[np.ndarray, int]) -> tuple[int, dict[str, np.ndarray]]:
    path = tmp_path / "written.safetensors"
    path.write_bytes(stored["matrix"].file.read_bytes())
    with path.open("r+b") as file:
        changed = sum(write_rows(stored["matrix"], rows, start, file) for rows, start in parts)
    return changed, {name: tensor.view() for name, tensor in open_file(path).items()}


@TRANSPOSED
@KINDS
def test_rows_in_parts_are_rounded_as_all_at_once(stored, tmp_path, values, kind):
    values[7, :5] = 0
    changed, found = written(stored, tmp_path, (values[:BAND], 0), (values[BAND:], BAND))
    np.testing.assert_array_equal(found["matrix"], values.astype(DTYPES[kind]), strict=True)
    assert changed == values.size - 5
    assert not found["a"].any()
    assert not found["z"].any()


@TRANSPOSED
@KINDS
def test_what_is_stored_is_cast_into_any_layout(values, kind):
    stored = np.ascontiguousarray(values, DTYPES[kind])
    places = np.zeros_like(values)  # in the layout of the values
    cast_tiles(stored, places, (130, 64))
    np.testing.assert_array_equal(places, stored.astype(np.float32))


@TRANSPOSED
@KINDS
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan, np.float32(3.4028235e38), np.float32(-3.4028235e38)])
def test_what_is_not_finite_as_stored_is_refused_wherever_it_lies(stored, tmp_path, values, kind, bad):
    values[ROWS - 1, COLUMNS - 1] = bad
    if np.isfinite(bad) and kind == "F32":  # the largest float32 is infinite in the others
        assert written(stored, tmp_path, (values, 0))[0]
    else:
        with pytest.raises(JaxguardError, match=f"tensor 'matrix' has values that are not finite in {kind}"):
            written(stored, tmp_path, (values, 0))


@pytest.mark.parametrize("transposed", [False])
@pytest.mark.parametrize("kind", ["BF16"])
def test_without_a_file_it_only_counts(stored, values):
    before = stored["matrix"].file.read_bytes()
    assert write_rows(stored["matrix"], values, 0, None) == values.size
    assert write_rows(stored["matrix"], np.zeros((4, COLUMNS), ml_dtypes.bfloat16), 9, None) == 0
    assert stored["matrix"].file.read_bytes() == before


@pytest.mark.parametrize("kind", ["BF16"])
def test_truncated_base_is_named(stored):
    with stored["matrix"].file.open("r+b") as file:
        file.truncate(stored["matrix"].stop - 1)
    with pytest.raises(JaxguardError, match=r"zeros\.safetensors"):
        write_rows(stored["matrix"], np.zeros((ROWS, COLUMNS), np.float32), 0, None)
