"""Policy gradients: the objectives' definitions, and that rows, micro-batches and devices do not change them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxguard.config.reinforce import ReinforceConfig
from jaxguard.config.train import MeshConfig
from jaxguard.data.encoding import EncodedExample
from jaxguard.data.format.dialogue import Mode
from jaxguard.data.packing import assemble, bucketed, pack, target_spans
from jaxguard.models.compute import Compute
from jaxguard.models.sharding import batch_sharding, make_mesh, shard_batch
from jaxguard.train.objectives import PolicyGradient
from jaxguard.train.step import logprobs, loss_and_gradient

ROW, POLICY, GROUP = 256, 9, 8
_gradient = jax.jit(loss_and_gradient, static_argnames=("objective", "spec", "compute", "accumulation", "loss_chunk"))
_logprobs = jax.jit(logprobs, static_argnames=("spec", "compute", "loss_chunk"))


def answers(prompts: int, seed: int = 0) -> list[EncodedExample]:
    """Groups of answers of 2 to 9 tokens, each beginning differently, to prompts under one policy; every fourth advantage is 0."""
    random = np.random.default_rng(seed)
    policy, out = random.integers(0, 512, POLICY), []
    for i in range(prompts):
        prompt = random.integers(0, 512, int(random.integers(3, 20)))
        for k in range(GROUP):
            tokens = np.int32([*policy, *prompt, 64 * i + k, *random.integers(0, 512, int(random.integers(1, 9)))])
            target = np.arange(len(tokens)) >= POLICY + len(prompt)
            advantage = float(random.normal()) if k % 4 else 0.0
            reference = np.zeros(target.sum(), np.float32)
            name = f"{i}.{k}"
            out.append(
                EncodedExample(name, Mode.DIRECT, tokens, target, (), (), False, weight=advantage, reference=reference)
            )
    return out


def batch_of(examples, row_multiple: int = 1, share: bool = True):
    rows = pack(examples, ROW, row_multiple, share)
    return rows, assemble(rows, bucketed(rows, ROW, row_multiple))


def scored(spec, weights, batch) -> np.ndarray:
    """The log-probabilities of a batch's targets."""
    kwargs = {"spec": spec, "compute": Compute(), "loss_chunk": 64}
    ids_BM1 = batch.target_ids_BM[..., None]
    return np.asarray(_logprobs(weights, jax.tree.map(jnp.asarray, batch), ids_BM1, **kwargs))[..., 0]


@pytest.fixture(scope="module")
def sampled(spec, weights):
    """Answers to two prompts, each token of which has become more or less likely since; with each one's log-probabilities now."""
    random, out, now = np.random.default_rng(1), [], {}
    for example in answers(2):
        _, alone = batch_of([example])
        own = scored(spec, weights, alone)[0, : example.loss_mask.sum()]
        change = random.normal(random.normal(0, 0.3), 0.3, len(own))
        out.append(replace(example, reference=(own - change).astype(np.float32)))
        now[example.example_id] = own.astype(np.float64)
    return out, now


def defined(
    kind: str, settings: ReinforceConfig, examples, now
) -> tuple[float, dict[str, float], dict[str, np.ndarray]]:
    """The loss, what is logged, and the loss's derivative by each token's log-probability, as the papers write them."""
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    gains, slopes, logged = {}, {}, {name: {} for name in ("ratio", "ratio_error", "clipped", "kl")}
    for example in examples:
        name, A = example.example_id, example.weight
        new, old = now[name], example.reference.astype(np.float64)
        ratio = np.exp(new - old)
        if kind == "gspo":
            ratio = np.full(len(new), (np.exp(new.sum()) / np.exp(old.sum())) ** (1 / len(new)))
        if kind == "cispo":
            cut = ratio > high
            gains[name] = np.minimum(ratio, high) * A * new
            slopes[name] = np.minimum(ratio, high) * A
        else:
            cut = (ratio > high) & (A > 0) | (ratio < low) & (A < 0)
            gains[name] = np.minimum(ratio * A, np.clip(ratio, low, high) * A)
            slopes[name] = np.where(cut, 0, ratio * A)
        logged["ratio"][name], logged["ratio_error"][name] = ratio, np.abs(ratio - 1)
        logged["clipped"][name], logged["kl"][name] = cut, ratio - 1 - np.log(ratio)
    tokens = sum(map(len, now.values()))

    def weight(name: str, average: str) -> float:
        """Of a token in the mean."""
        return {
            "tokens": 1 / tokens,
            "answers": 1 / len(now[name]) / len(now),
            "constant": 1 / settings.max_tokens / len(now),
        }[average]

    def mean(x: dict[str, np.ndarray], average: str) -> float:
        return sum(float(own.sum()) * weight(name, average) for name, own in x.items())

    average = settings.average
    slopes = {name: -own * weight(name, average) for name, own in slopes.items()}
    over = "tokens" if average == "tokens" else "answers"
    return -mean(gains, average), {f"policy/{name}": mean(x, over) for name, x in logged.items()}, slopes


KINDS, AVERAGES = ("grpo", "gspo", "cispo"), ("tokens", "answers", "constant")


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_papers(spec, weights, sampled, kind, average):
    examples, now = sampled
    settings = ReinforceConfig(average=average, clip_low=0.2, clip_high=0.3, max_tokens=11)
    expected, logged, slopes = defined(kind, settings, examples, now)
    changes = [now[each.example_id] - each.reference for each in examples]
    ratios = np.exp([x.mean() for x in changes] if kind == "gspo" else np.concatenate(changes))
    assert ratios.min() < 0.8
    assert ratios.max() > 1.3
    assert logged["policy/clipped"] > 0
    objective = PolicyGradient(kind, settings)
    rows, batch = batch_of(examples)
    assert batch.tokens_BT.shape[0] < len(examples)
    loss_of = jax.value_and_grad(lambda x_BM: objective.loss(x_BM, jax.tree.map(jnp.asarray, batch)), has_aux=True)
    (loss, found), slopes_BM = loss_of(jnp.asarray(scored(spec, weights, batch)))
    count = float(objective.count(batch))
    assert float(loss) / count == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert {name: float(x) / count for name, x in found.items()} == pytest.approx(logged, rel=1e-4, abs=1e-7)
    for r, row in enumerate(rows):
        for example, span in target_spans(row):
            want = slopes[example.example_id]
            if kind == "gspo":  # each token of an answer moves the ratio of all of them
                want = np.full(len(want), want.mean())
            assert np.asarray(slopes_BM)[r, span] / count == pytest.approx(want, rel=1e-4, abs=1e-9)
    assert not np.asarray(slopes_BM)[batch.target_pairs_BM == 0].any()


def test_padding_never_counts(sampled):
    """Whatever its log-probabilities are."""
    examples, _ = sampled
    rows, _ = batch_of(examples)
    shape = bucketed(rows, ROW, 1)
    wide = shape._replace(rows=shape.rows + 1, targets=shape.targets + 7, pairs=shape.pairs + 3)
    random = np.random.default_rng(0)
    for kind in KINDS:
        for average in AVERAGES:
            found = []
            for each in (shape, wide):
                batch = assemble(rows, each)
                padding_BM = batch.target_pairs_BM == 0
                logprobs_BM = np.where(
                    padding_BM, random.normal(50, 10, padding_BM.shape), batch.target_reference_BM + 0.1
                )
                batch.target_reference_BM[padding_BM] = -200
                objective = PolicyGradient(kind, ReinforceConfig(average=average))
                loss, logged = objective.loss(jnp.float32(logprobs_BM), jax.tree.map(jnp.asarray, batch))
                found.append([float(objective.count(batch)), float(loss), *map(float, logged.values())])
            assert found[0] == pytest.approx(found[1], rel=1e-5)


def loss_of(kind: str, average: str, spec, weights, batch, accumulation: int = 1):
    objective = PolicyGradient(kind, ReinforceConfig(average=average))
    compute = Compute(attention="block_sparse", query_chunk=16)
    kwargs = {"spec": spec, "compute": compute, "accumulation": accumulation, "loss_chunk": 64}
    return _gradient(weights, batch, objective, **kwargs)


def assert_same(found, expected) -> None:
    for got, want in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.abs(np.asarray(got) - want).max() <= 1e-5 * max(np.abs(want).max(), 1e-6)


@pytest.mark.parametrize(
    ("kind", "average"),
    [
        ("gspo", "answers"),
        pytest.param("grpo", "tokens", marks=pytest.mark.slow),
        pytest.param("cispo", "constant", marks=pytest.mark.slow),
    ],
)
def test_trees_micro_batches_and_devices_change_no_gradient(spec, weights, sampled, kind, average):
    examples, _ = sampled
    apart = [row for each in examples for row in pack([each], ROW, 1, share=False)]
    expected = loss_of(kind, average, spec, weights, assemble(apart, bucketed(apart, ROW, 1)))
    for accumulation in (1, 2, 4):
        _, batch = batch_of(examples, accumulation)
        assert batch.tokens_BT.shape[0] == accumulation
        assert_same(loss_of(kind, average, spec, weights, batch, accumulation), expected)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), jax.devices())
    with jax.set_mesh(mesh):
        _, batch = batch_of(examples, 8)
        found = loss_of(kind, average, spec, weights, shard_batch(batch, batch_sharding(mesh)))
    assert_same(found, expected)


def test_answers_to_a_prompt_share_it():
    examples = answers(2)
    rows, batch = batch_of(examples)
    prompts = {tuple(e.tokens[~e.loss_mask]) for e in examples}
    wanted = POLICY + sum(len(prompt) - POLICY for prompt in prompts) + sum(int(e.loss_mask.sum()) for e in examples)
    assert len(rows) == 1
    assert len(prompts) == 2
    assert len(batch.valid_positions) == wanted


@pytest.mark.parametrize("average", AVERAGES)
def test_where_all_ratios_are_one_all_kinds_have_one_gradient(sampled, average):
    """That of each token's log-probability times its advantage; an answer's is spread over its tokens by gspo."""
    examples, _ = sampled
    _, batch = batch_of(examples)
    slopes = []
    for kind in KINDS:
        objective = PolicyGradient(kind, ReinforceConfig(average=average))
        loss_of = jax.grad(lambda x_BM, own=objective: own.loss(x_BM, jax.tree.map(jnp.asarray, batch)), has_aux=True)
        slopes_BM, logged = loss_of(jnp.asarray(batch.target_reference_BM))
        assert float(logged["policy/ratio_error"]) == float(logged["policy/clipped"]) == 0
        slopes.append(np.asarray(slopes_BM))
    assert np.abs(slopes[0]).max() > 1e-3
    for other in slopes[1:]:
        assert other == pytest.approx(slopes[0], rel=1e-5, abs=1e-9)
