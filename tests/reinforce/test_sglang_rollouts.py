"""Rollouts of a real SGLang server: `make test-sglang`."""

import jax
import pytest
from tiny_rollouts import opened, sampler

import sglang_server
from jaxguard.reinforce.sampling import continued, fingerprint, prompt_of
from jaxguard.utils.errors import JaxguardError

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(not sglang_server.PYTHON.is_file(), reason="no SGLang: run `make sglang-cpu`"),
]


def test_a_server_samples_by_the_weights_of_each_step(guard, tmp_path):
    """It loads two steps' weights, one after the other; its log-probabilities are the training step's, and not those of others."""
    source = guard.parent / "runs/first/export"
    with sglang_server.serve(source, "guard", tmp_path / "log", threads=1) as server:
        rollouts, weights = opened(guard, f"reinforce.endpoint={server.url}", f"run_folder={tmp_path}")
        prompts, other = rollouts._prompts(0), jax.tree.map(lambda x: 1.3 * x, weights)
        for own in (weights, other):
            current = sampler(rollouts, own)
            assert current.version == fingerprint(own)
            answers = current.answers(prompts, seed=0)
            assert len(answers) == 32
            sequences = [
                continued(prompts[a.prompt], prompt_of(prompts[a.prompt]), a.ids, 1.0, a.logprobs) for a in answers
            ]
            errors = [
                abs(scored - sequence.reference).max()
                for scored, sequence in zip(current._score(sequences), sequences, strict=True)
            ]
            assert max(errors) <= 1e-3
        mixed = sampler(rollouts, weights)
        completions = mixed._complete(prompts, seed=0)
        with pytest.raises(JaxguardError, match="other probabilities than the training step"):
            sampler(rollouts, other)._compare(prompts, completions)
