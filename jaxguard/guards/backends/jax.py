"""A Backend that computes in this process with JAX, over the training mesh."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxguard.config import Config
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.guards.backends.log_odds import next_log_odds
from jaxguard.guards.backends.sampler import Model, Sampling, generate, place_model
from jaxguard.guards.protocol import Completion
from jaxguard.models.compute import choose_compute
from jaxguard.models.hf_io.checkpoints import check_vocabulary, read_weights
from jaxguard.models.mesh import make_mesh, weight_shardings
from jaxguard.models.spec import UnsupportedModelError, read_spec
from jaxguard.utils.errors import JaxguardError


@dataclass(frozen=True)
class JaxBackend:
    """Implements protocol.Backend.

    Attributes:
        model: the guard's weights, on the mesh.
        settings: how to sample.
        max_seq_len: of the packed rows in which verdicts are scored.
    """

    model: Model
    settings: EvaluateConfig
    max_seq_len: int

    async def sample(
        self, prompts: Sequence[Sequence[int]], n: int, max_tokens: int, stop_ids: tuple[int, ...]
    ) -> list[list[Completion]]:
        settings = self.settings
        sampling = Sampling(settings.temperature, settings.top_p, max_tokens, stop_ids, settings.seed, n)
        return generate(self.model, prompts, sampling, rows=settings.batch)

    async def log_odds(self, prefixes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]]) -> list[float]:
        return next_log_odds(self.model, prefixes, pairs, max_seq_len=self.max_seq_len)

    @property
    def group(self) -> int:
        return max(1, self.settings.batch // max(1, self.settings.generations))

    @property
    def workers(self) -> int:
        return 1


def load_backend(folder: Path, config: Config, settings: EvaluateConfig) -> JaxBackend:
    """Read a checkpoint onto the config's mesh.

    Raises:
        JaxguardError: the checkpoint cannot be read, our decoder lacks its architecture, or the mesh does not fit the devices.
    """
    try:
        spec = read_spec(folder)
    except UnsupportedModelError as error:
        raise JaxguardError(
            f"{error}. JAX cannot compute this guard, SGLang may: set evaluate.backend=sglang, or serve it and give the "
            "guard the server's endpoint"
        ) from None
    check_vocabulary(folder, spec)
    mesh = make_mesh(config.mesh)
    compute = choose_compute(config.model, spec, mesh, config.data.max_seq_len)
    weights = read_weights(folder, spec, weight_shardings(spec, mesh), compute.matmul_dtype or compute.dtype)
    model = place_model(spec, weights, compute, mesh)
    return JaxBackend(model, settings, config.data.max_seq_len)
