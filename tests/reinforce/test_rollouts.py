"""Rollouts: what a step samples and trains on, on disk and off it, and whole runs with the tiny model."""

import asyncio
import re
import shutil
from dataclasses import replace
from pathlib import Path

import faulty_sglang
import numpy as np
import pytest
from tiny_rollouts import DIRECT, RUN, opened, sampler

from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import Mode, all_answers, written
from jaxguard.reinforce import rollouts as rollouts_module
from jaxguard.reinforce import sampling as sampling_module
from jaxguard.reinforce.__main__ import main
from jaxguard.reinforce.rewards import expected
from jaxguard.reinforce.sampling import by_prompt, fingerprint, prompt_of, read_answers, write_answers
from jaxguard.train.__main__ import main as train
from jaxguard.train.logging import read_metrics
from jaxguard.train.reference import score_targets
from jaxguard.utils.errors import JaxguardError


def test_the_sampler_and_the_trainer_agree(guard):
    """Each token's log-probability is the one that the training step computes, by which it is stored."""
    rollouts, weights = opened(guard)
    prompts = rollouts._prompts(0)
    answers = sampler(rollouts, weights).answers(prompts, seed=0)
    assert len(answers) == 32
    sequences = [
        sequence for group in by_prompt(answers) for sequence in rollouts._weighted(prompts[group[0].prompt], group)
    ]
    scored = score_targets(sequences, rollouts.program, weights, 8, 512, 4)
    for sequence, logprobs in zip(sequences, scored, strict=True):
        assert np.abs(logprobs - sequence.reference).max() <= 1e-4
    assert any(answer.verdict for answer in answers)
    assert all(len(answer.ids) == len(answer.logprobs) <= 32 for answer in answers)
    assert all(answer.ended == (answer.ids[-1] == rollouts.encoder.template.end_id) for answer in answers)


def test_samples_depend_on_the_prompt_and_the_seed_alone(guard):
    rollouts, weights = opened(guard)
    prompts = rollouts._prompts(0)
    first, again, other = (sampler(rollouts, weights).answers(prompts, seed) for seed in (3, 3, 4))
    assert first == again
    assert [answer.ids for answer in first] != [answer.ids for answer in other]


def test_in_direct_mode_the_expected_reward_needs_no_samples(guard):
    """Its weights are the gradient of the expected reward by the log-probabilities of all verdicts."""
    rollouts, weights = opened(guard, "reinforce.reward.kind=probability")
    prompts = rollouts._prompts(0)
    answers = sampler(rollouts, weights).answers(prompts, seed=0)
    assert [answer.prompt for answer in answers] == list(range(8))
    for answer, example in zip(answers, prompts, strict=True):
        assert answer.ids == ()
        totals = [sum(own) for own in answer.scored]
        reward, slopes = expected(totals, example.answers, rollouts._settings.reward)
        assert answer.reward == pytest.approx(reward)
        sequences = list(rollouts._weighted(example, [answer]))
        texts = [rollouts.encoder.tokenizer.decode(each.tokens[each.loss_mask]) for each in sequences]
        assert texts == [written(verdict) + rollouts.encoder.template.end for verdict in all_answers(example.answers)]
        assert [each.weight for each in sequences] == pytest.approx(slopes.tolist())


def test_groups_without_a_lesson_make_room_for_others(guard):
    """Dynamic sampling is by correctness: groups that are all right or all wrong are left out while there are candidates."""
    rollouts, weights = opened(guard, "reinforce.candidates=3", "train.batch_size=4")
    assert len(rollouts.examples(0)) == 12
    answers = sampler(rollouts, weights).answers(rollouts._prompts(0), seed=0)
    groups = by_prompt(answers)
    assert [group[0].prompt for group in groups] == sorted({answer.prompt for answer in answers})
    trained = [group for group in groups if group[0].trained]
    assert 1 <= len(trained) <= 4 <= len(groups) <= 12
    mixed = [group for group in groups if len({answer.right for answer in group}) == 2]
    assert trained == mixed or not mixed
    summary = rollouts._summary(0, answers)  # of all that were sampled
    assert summary["rollouts/groups"] == len(groups)
    assert summary["rollouts/groups_with_signal"] == pytest.approx(len(mixed) / len(groups))
    sequences = [each for group, own in rollouts._sequences(0, answers) if group[0].trained for each in own]
    assert rollouts._batch(0, answers).num_targets == sum(int(each.loss_mask.sum()) for each in sequences)


def test_exact_rewards_of_several_answers_count_as_their_mean(guard):
    """A prompt weighs the same however often it is answered, in the gradient of verdicts as in that of reasoning."""
    rollouts, weights = opened(guard, "reinforce.reward.kind=probability")
    prompts = rollouts._prompts(0)
    [answer, *_] = sampler(rollouts, weights).answers(prompts, seed=0)
    alone = [each.weight for each in rollouts._weighted(prompts[0], [answer])]
    thought = replace(answer, ids=(5,), logprobs=(-1.0,), reasoning=1)
    rewards = 0.5, -0.5, -0.75, 0.25
    own = [each.weight for each in rollouts._weighted(prompts[0], [replace(thought, reward=r) for r in rewards])]
    size = 1 + len(alone)
    others = [(sum(rewards) - r) / 3 for r in rewards]
    assert own[::size] == pytest.approx([(r - mean) / 4 for r, mean in zip(rewards, others, strict=True)])
    for i, slope in enumerate(alone, 1):
        assert sum(own[i::size]) == pytest.approx(slope)


@pytest.mark.parametrize("mode", ["direct", "reasoning"])
def test_any_verdict_fits_behind_the_longest_answer(guard, mode):
    """Where a prompt was cut, so that it and an answer of max_tokens take a whole row."""
    rollouts, _ = opened(guard)
    encoder = rollouts.encoder
    long = Example("long", "s", "word " * 3000, prompt_label="harmful")
    example = encoder.unanswered(long, Mode(mode), 32)
    assert example.cut
    longest = max(map(len, encoder.verdicts(example.answers)))
    assert len(prompt_of(example)) + 32 + longest <= encoder.max_seq_len


def run(path: Path, *overrides: str) -> Path:
    name = next((text.partition("=")[2] for text in overrides if text.startswith("name=")), "tiny")
    assert main(["--config", str(path), *DIRECT, *RUN, *overrides]) == 0
    return path.parent / "runs" / name


def steps(folder: Path) -> list[dict]:
    return [record | {"speed": 0} for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


def test_a_run_that_is_killed_while_it_samples_ends_with_the_same_bits(guard, monkeypatch):
    whole = run(guard, "name=whole", "reinforce.updates=2")
    write = rollouts_module.write_answers

    class Killed(BaseException):
        pass

    def killed(path: Path, step: int, *rest) -> None:
        if step == 3:
            path.with_suffix(".partial").write_text("half")
            raise Killed
        write(path, step, *rest)

    monkeypatch.setattr(rollouts_module, "write_answers", killed)
    with pytest.raises(Killed):
        run(guard, "name=killed", "reinforce.updates=2")
    monkeypatch.undo()
    resumed = run(guard, "name=killed", "reinforce.updates=2")
    assert steps(resumed) == steps(whole)
    for name in ("export/model.safetensors", *(f"rollouts/{step:06d}.jsonl" for step in range(4))):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(resumed.glob("rollouts/*.partial"))
    assert re.search(r"<summary>\s*example-\d+: right \d+%", (whole / "rollouts.html").read_text())
    assert steps(whole)[0]["policy/ratio_error"] <= 1e-4  # sampled by the weights of the step
    assert steps(whole)[1]["policy/ratio_error"] > 1e-4  # by those of the step before


def test_answers_of_other_weights_are_not_trained_on(guard, caplog):
    """Of a step that samples they are sampled again; of one in between nothing can replace them."""
    whole = run(guard, "name=stale", "reinforce.updates=2")
    before = steps(whole)
    answers = read_answers(whole / "rollouts/000002.jsonl")
    for step in (3, 4):
        shutil.rmtree(whole / f"checkpoints/{step}", ignore_errors=True)
    shutil.copy(whole / "rollouts/000000.jsonl", whole / "rollouts/000002.jsonl")
    run(guard, "name=stale", "reinforce.updates=2")
    assert "other weights" in caplog.text
    assert read_answers(whole / "rollouts/000002.jsonl") == answers
    assert steps(whole) == before


def test_a_lost_file_is_named(guard, tmp_path):
    rollouts, weights = opened(guard, "reinforce.updates=4", f"run_folder={tmp_path}")
    batches = rollouts.read(0, 1, lambda: weights)
    next(batches)
    path = tmp_path / "tiny/rollouts/000001.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(JaxguardError, match=r"000001\.jsonl is lost or damaged, and the weights of step 0"):
        next(batches)


def test_a_policy_that_says_one_thing_stops(guard, tmp_path):
    rollouts, weights = opened(guard, "reinforce.collapse_steps=2", f"run_folder={tmp_path}")
    answers = sampler(rollouts, weights).answers(rollouts._prompts(0), seed=0)

    def said(words: dict) -> list:
        """The answers, with these words, else those of the labels."""
        prompts = rollouts._prompts(0)
        return [replace(each, verdict=dict(prompts[each.prompt].answers) | words) for each in answers]

    # Labels of both questions differ. A policy may collapse on one of them, and say another word there than on the other.
    same = said({"prompt_harm": "unharmful"})
    for step, each in enumerate((same, answers, same, said({"response_harm": "harmful"}))):
        rollouts._stop_if_collapsed(step, each)
    with pytest.raises(JaxguardError, match="every answer said 'harmful' on response_harm"):
        rollouts._stop_if_collapsed(4, said({"prompt_harm": "unharmful", "response_harm": "harmful"}))


def test_a_resumed_run_knows_for_how_long_it_said_one_thing(guard, tmp_path):
    rollouts, weights = opened(guard, "reinforce.collapse_steps=3", f"run_folder={tmp_path}")
    answers = sampler(rollouts, weights).answers(rollouts._prompts(0), seed=0)
    same = [
        replace(each, verdict={q: "unharmful" for q, _ in rollouts._prompts(0)[each.prompt].answers})
        for each in answers
    ]
    for step in range(3):
        rollouts._path(step).parent.mkdir(parents=True, exist_ok=True)
        write_answers(rollouts._path(step), step, fingerprint(weights), same)
    with pytest.raises(JaxguardError, match="step 2: in 3 steps in a row"):
        next(rollouts.read(2, 1, lambda: weights))


def test_the_fingerprint_sees_every_bit(guard):
    _, weights = opened(guard)
    path = next(iter(weights))
    changed = np.asarray(weights[path]).copy()
    changed.flat[-1] = np.nextafter(changed.flat[-1], np.float32(1))
    assert fingerprint(weights) == fingerprint(dict(weights)) != fingerprint(weights | {path: changed})


def test_the_wrong_command_names_the_right_one(guard, capsys):
    assert train(["--config", str(guard), *DIRECT, "train.objective.kind=grpo", "name=wrong"]) == 2
    assert "jaxguard reinforce" in capsys.readouterr().err
    assert main(["--config", str(guard), *DIRECT, "name=wrong"]) == 2
    assert "jaxguard train" in capsys.readouterr().err


class Sampling(faulty_sglang.FaultySglang):
    """A server that samples one answer, with its log-probabilities."""

    def good(self, request):
        entries = [[-0.5, token, None] for token in faulty_sglang.SAMPLE]
        answer = faulty_sglang.sample(version=self.version)
        answer["meta_info"]["output_token_logprobs"] = entries
        n = request["sampling_params"].get("n", 1)
        return [answer] * n if n > 1 else answer


def ask_server(guard: Path, tmp_path: Path, monkeypatch, logprob: float, **how) -> tuple[Sampling, Path]:
    """Answers of a server to a step's prompts, of which the training step gives each token this log-probability."""

    async def ask():
        async with faulty_sglang.serve(lambda _: "", Sampling, **how) as server:
            options = f"reinforce.endpoint={server.url}", f"run_folder={tmp_path}"
            rollouts, weights = opened(guard, *options)

            def scored(sequences, *_):
                return [np.full(int(each.loss_mask.sum()), logprob) for each in sequences]

            monkeypatch.setattr(sampling_module, "score_targets", scored)
            await asyncio.to_thread(lambda: next(rollouts.read(0, 1, lambda: weights)))
            return server, weights

    return asyncio.run(ask())


def test_a_server_samples_by_the_weights_of_the_step(guard, tmp_path, monkeypatch):
    server, weights = ask_server(guard, tmp_path, monkeypatch, -0.5)
    assert server.version == fingerprint(weights)
    assert server.paths.count("/update_weights_from_disk") == 1
    sampled = [request for request in server.requests if request["sampling_params"]["max_new_tokens"] == 32]
    assert len(sampled) == 8
    assert all(request["return_logprob"] for request in sampled)
    assert all(
        request["sampling_params"]["temperature"] == request["sampling_params"]["top_p"] == 1 for request in sampled
    )
    answers = read_answers(tmp_path / "tiny/rollouts/000000.jsonl")
    assert {answer.ids for answer in answers} == {tuple(faulty_sglang.SAMPLE)}
    assert {answer.logprobs for answer in answers} == {(-0.5,) * 4}
    [exported] = (tmp_path / "tiny/rollouts/weights").iterdir()
    assert exported.name == server.version


def test_a_server_with_other_probabilities_is_refused(guard, tmp_path, monkeypatch):
    with pytest.raises(JaxguardError, match=r"by a factor of 1\.649"):
        ask_server(guard, tmp_path, monkeypatch, -1.0)
    assert not list(tmp_path.glob("tiny/rollouts/*.jsonl"))


def test_a_server_that_keeps_its_weights_is_refused(guard, tmp_path, monkeypatch):
    with pytest.raises(JaxguardError, match="answered with weights 'default'"):
        ask_server(guard, tmp_path, monkeypatch, -0.5, swaps=False)
