"""What the tests of objectives share."""

import jax
import pytest

from jaxguard.models.spec import read_spec
from jaxguard.models.weights import initialize


@pytest.fixture(params=["llama", "gemma"], scope="module")
def spec(request, tmp_path_factory, write_llama_config, write_gemma3_config):
    folder = tmp_path_factory.mktemp("config")
    (write_llama_config if request.param == "llama" else write_gemma3_config)(folder)
    return read_spec(folder)


@pytest.fixture(scope="module")
def weights(spec):
    found = initialize(spec, jax.random.key(0))
    return {path: x if "norm" in path else 5 * x for path, x in found.items()}
