"""Tokens, targets, probes, branches and cutting."""

import itertools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxguard.config.data import DataConfig, SourceConfig
from jaxguard.data.encoding import CUT_MARK, MIN_KEPT, Encoder, PromptTooLongError, common_length
from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import CHOICES, Mode, answers, questions
from jaxguard.data.format.template import TEMPLATE_KWARGS
from jaxguard.data.packing import pack
from jaxguard.data.policies import QUESTIONS, Category, Policy
from jaxguard.utils.errors import JaxguardError

TOKENIZERS = ["tiny", "smollm2", "llama3_1", "gemma3"]
BOTH = Example(
    "both", "s", "Is it ok?", "It is.", "unharmful", "harmful", "compliance", trace="It is rude. So it goes."
)
ALONE = Example("alone", "s", "Is it ok?", prompt_label="harmful", trace="It is a question.")
PARTLY = Example("partly", "s", "Is it ok?", "It is.", response_label="unharmful", trace="It answers.")
EXAMPLES = [BOTH, ALONE, PARTLY]
LONG = "word and more of it, "


@pytest.fixture(params=TOKENIZERS)
def encoder(request, encoder_of) -> Encoder:
    return encoder_of(request.param)


def data_config(max_seq_len: int = 512) -> DataConfig:
    return DataConfig(train=(SourceConfig(kind="jsonl", path="absent.jsonl"),), max_seq_len=max_seq_len)


def decode(encoder: Encoder, tokens: np.ndarray) -> str:
    """The text of tokens as it is; older transformers would take out some of its spaces."""
    return str(encoder.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("mode", Mode)
def test_target_is_exactly_the_answer_and_its_end(encoder: Encoder, mode: Mode):
    for example in EXAMPLES:
        sequence = encoder.encode(example, mode)
        asks = questions(example, encoder.policy)
        answer = encoder.dialogue.completion(answers(example, asks), example.trace, mode)
        first = int(np.argmax(sequence.loss_mask))
        assert sequence.loss_mask.tolist() == [False] * first + [True] * (len(sequence.tokens) - first)
        assert decode(encoder, sequence.tokens[first:]) == answer + encoder.template.end
        assert decode(encoder, sequence.tokens[:first]).endswith(encoder.template.after)
        assert sequence.tokens[-1] == encoder.template.end_id
        assert (sequence.tokens.dtype, sequence.loss_mask.dtype, sequence.cut) == (np.int32, bool, False)
        assert (sequence.example_id, sequence.mode) == (example.id, mode)


def test_text_is_what_the_chat_template_renders(encoder: Encoder):
    """The whole conversation, rendered at once, begins with our text; only the template's tail may follow."""
    sequence = encoder.encode(BOTH, Mode.REASONING)
    turn = encoder.dialogue.user_turn(BOTH.prompt, BOTH.response, encoder.policy, QUESTIONS, Mode.REASONING)
    turns = [{"role": "user", "content": turn}]
    answer = encoder.dialogue.completion(sequence.answers, BOTH.trace, Mode.REASONING)
    turns.append({"role": "assistant", "content": f"  {answer}\n "})
    whole = encoder.tokenizer.apply_chat_template(turns, tokenize=False, **TEMPLATE_KWARGS)
    ours = decode(encoder, sequence.tokens)
    if encoder.template.end == "<|im_end|>":  # SmolLM2's template alone does not trim
        whole = whole.replace("  <think>", "<think>").replace("\n <|im_end|>", "<|im_end|>")
    assert whole.startswith(ours)
    assert whole.removeprefix(ours).strip() == ""


def test_a_server_sees_the_same_ids(encoder: Encoder):
    """/v1/chat/completions renders and tokenises messages; it has to arrive at `prompt`."""
    for mode in Mode:
        turns = [{"role": "user", "content": encoder.prompt(BOTH, mode).turn}]
        served = encoder.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=False, **TEMPLATE_KWARGS
        )
        prompt = encoder.prompt(BOTH, mode)
        assert prompt.ids == served
        trained = encoder.encode(BOTH, mode)
        assert trained.tokens[~trained.loss_mask].tolist() == served


@pytest.mark.parametrize("mode", Mode)
def test_a_preference_is_encoded_as_the_tokens_that_were_sampled(encoder: Encoder, mode: Mode):
    """Tokens of single letters, which nobody gets by tokenizing the text."""
    trace, end = "It is rude.", encoder.template.end_id
    thought = f"<think>\n{trace}\n</think>\n\n" if mode is Mode.REASONING else ""
    start, absent = encoder.ids(thought), "\nResponse harm: None\nResponse refusal: None"
    right, wrong = (
        [*start, *itertools.chain(*map(encoder.ids, f"Prompt harm: {word}{absent}"))]
        for word in ("harmful", "unharmful")
    )
    text = decode(encoder, wrong)
    example = replace(ALONE, trace=trace, rejected=text, sampled=((*right, end), (*wrong, end)))
    assert text == f"{thought}Prompt harm: unharmful{absent}"

    def answers_of(example: Example) -> list[list[int]]:
        [(encoded,)] = encoder.encode_all([(example, mode)], 1)
        return [each.tokens[each.loss_mask].tolist() for each in encoded.sequences]

    assert answers_of(example) == [[*right, end], [*wrong, end]]
    retokenized = answers_of(replace(example, sampled=None))
    assert retokenized == [
        encoder.ids(decode(encoder, right) + encoder.template.end),
        encoder.ids(text + encoder.template.end),
    ]
    others = [
        (right, wrong),  # they did not end
        ((*wrong, end), (*right, end)),  # of other answers
        ((*right, len(encoder.tokenizer), end), (*wrong, len(encoder.tokenizer), end)),
        ((), ()),
    ]
    for sampled in others:
        assert answers_of(replace(example, sampled=tuple(map(tuple, sampled)))) == retokenized
    assert answers_of(replace(example, sampled=((), (*wrong, end)))) == [retokenized[0], [*wrong, end]]
    assert answers_of(replace(example, rejected=None)) == retokenized[:1]


@pytest.mark.parametrize("mode", Mode)
def test_both_answers_of_a_preference_fit_into_one_row(encoder: Encoder, mode: Mode):
    """A row holds the prompt once and both answers."""
    long = replace(BOTH, prompt="word " * 2000, trace="It is rude. " * 12, rejected="It is not. " * 20)
    chosen = encoder.encode(long, mode)
    assert chosen.cut
    [row] = pack([chosen], encoder.max_seq_len, 1)
    assert encoder.max_seq_len - 24 <= row.tokens <= encoder.max_seq_len
    assert encoder.encode(replace(long, rejected="It is not. " * 400), mode) is None
    [(first,)] = encoder.encode_all([(long, mode)], 1)
    assert np.array_equal(first.tokens, chosen.tokens)


def test_a_prompt_needs_no_labels(encoder: Encoder):
    unlabelled = Example("u", "s", BOTH.prompt, BOTH.response)
    assert encoder.prompt(unlabelled, Mode.DIRECT).ids == encoder.prompt(BOTH, Mode.DIRECT).ids
    with pytest.raises(JaxguardError, match="no label"):
        encoder.encode(unlabelled, Mode.DIRECT)


@pytest.mark.parametrize("mode", Mode)
def test_probes_are_where_the_answers_part(encoder: Encoder, mode: Mode):
    sequence = encoder.encode(BOTH, mode)
    assert [p.question for p in sequence.probes] == list(QUESTIONS)
    for probe, (question, word) in zip(sequence.probes, sequence.answers, strict=True):
        positive, negative = CHOICES[question]
        given, other = (
            (probe.positive_id, probe.negative_id) if word == positive else (probe.negative_id, probe.positive_id)
        )
        assert sequence.tokens[probe.position] == given
        assert sequence.loss_mask[probe.position]
        flipped = replace(BOTH, **{FIELDS[question]: negative if word == positive else positive})
        tokens = encoder.encode(flipped, mode).tokens
        assert tokens[: probe.position].tolist() == sequence.tokens[: probe.position].tolist()
        assert tokens[probe.position] == other != given


FIELDS = {"prompt_harm": "prompt_label", "response_harm": "response_label", "response_refusal": "refusal_label"}


def test_absent_responses_are_not_probed(encoder: Encoder):
    sequence = encoder.encode(ALONE, Mode.DIRECT)
    assert [p.question for p in sequence.probes] == ["prompt_harm"]
    assert sequence.answers[1:] == (("response_harm", "None"), ("response_refusal", "None"))


@pytest.mark.parametrize("mode", Mode)
def test_branches_cover_every_history(encoder: Encoder, mode: Mode):
    branches = tuple(encoder.branches(BOTH, mode))
    first = encoder.encode(BOTH, mode)
    assert branches[0].tokens.tolist() == first.tokens.tolist()
    assert (branches[0].answers, branches[0].probes) == (first.answers, first.probes)
    words = [[word for _, word in branch.answers] for branch in branches]
    histories = {tuple(w[:2]) for w in words}
    assert histories == set(itertools.product(CHOICES["prompt_harm"], CHOICES["response_harm"]))
    assert len(branches) == 4
    assert {w[2] for w in words} == {"compliance"}
    start = first.probes[0].position
    assert all(branch.tokens[:start].tolist() == first.tokens[:start].tolist() for branch in branches)
    assert len([*encoder.branches(ALONE, mode)]) == len([*encoder.branches(PARTLY, mode)]) == 1


def test_branches_give_marginals(encoder: Encoder):
    """A model that answers by a known table: its marginals come back out of the probes alone."""
    table = np.random.default_rng(0).uniform(0.1, 0.9, (2, 2, 2))
    table /= table.sum()

    def chance(earlier: tuple[int, ...]) -> float:
        """P(next answer positive | earlier answers), 0 meaning positive."""
        return float(table[(*earlier, 0)].sum() / table[earlier].sum())

    branches = tuple(encoder.branches(BOTH, Mode.DIRECT))
    for place, question in enumerate(QUESTIONS):
        total, seen = 0.0, set()
        for branch in branches:
            path = tuple(CHOICES[q].index(word) for q, word in branch.answers)[:place]
            prefix = tuple(branch.tokens[: branch.probes[place].position].tolist())
            if prefix not in seen:
                seen.add(prefix)
                steps = [chance(path[:i]) if path[i] == 0 else 1 - chance(path[:i]) for i in range(place)]
                total += float(np.prod(steps)) * chance(path)
        axes = tuple(i for i in range(3) if i != place)
        assert total == pytest.approx(table.sum(axis=axes)[0]), question


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("prompt", "response"), [(400, 0), (400, 3), (3, 400), (400, 300), (90, 400)])
def test_cuts_only_untrusted_text(encoder: Encoder, mode: Mode, prompt: int, response: int):
    long = replace(BOTH, prompt=f"first {LONG * prompt}last", response=f"begin {LONG * response}end")
    sequence = encoder.encode(long, mode)
    assert sequence.cut
    assert 512 - 24 <= len(sequence.tokens) <= 512
    whole = encoder.dialogue.user_turn("PROMPT", "RESPONSE", encoder.policy, QUESTIONS, mode)
    text = decode(encoder, sequence.tokens[~sequence.loss_mask])
    frame, middle, rest = whole.partition("PROMPT")[0], *whole.partition("PROMPT")[2].split("RESPONSE")
    head, _, tail = text.removeprefix(encoder.template.before).removesuffix(encoder.template.after).partition(frame)
    assert head == ""
    assert tail.endswith(rest)
    kept_prompt, kept_response = tail.removesuffix(rest).split(middle)
    assert kept_prompt.startswith("first word") or kept_prompt == "first last"
    assert kept_prompt.endswith("last")
    assert kept_response.startswith("begin")
    assert kept_response.endswith("end")
    cut = CUT_MARK in kept_prompt, CUT_MARK in kept_response
    assert cut == (prompt > 90 or len(kept_prompt) < len(long.prompt), response > 90)
    if all(cut):  # cut alike
        assert len(kept_prompt) == pytest.approx(len(kept_response), rel=0.2)
    answer = encoder.dialogue.completion(sequence.answers, BOTH.trace, mode) + encoder.template.end
    assert decode(encoder, sequence.tokens[sequence.loss_mask]) == answer


def test_branches_of_a_cut_example_share_one_prompt(encoder: Encoder):
    long = replace(BOTH, response=LONG * 300)
    branches = tuple(encoder.branches(long, Mode.REASONING))
    prompts = {tuple(branch.tokens[~branch.loss_mask].tolist()) for branch in branches}
    assert (len(branches), len(prompts)) == (4, 1)
    assert max(len(branch.tokens) for branch in branches) <= 512
    assert tuple(encoder.encode(long, Mode.REASONING).tokens.tolist()) == tuple(branches[0].tokens.tolist())


@pytest.mark.parametrize("mode", Mode)
def test_every_length_fits(encoder_of, mode: Mode):
    encoder = encoder_of("tiny")
    for extra in range(0, 200, 7):
        example = replace(BOTH, prompt="abc " * extra, response="<think>" * extra)
        sequence = encoder.encode(example, mode)
        assert len(sequence.tokens) <= 512
        assert sequence.cut == (
            len(sequence.tokens) < len(replace(encoder, max_seq_len=9999).encode(example, mode).tokens)
        )


@pytest.mark.parametrize("name", ["tiny", "smollm2", "llama3_1", "gemma3"])
def test_examples_of_one_policy_share_its_tokens_and_nothing_of_the_text(encoder_of, name):
    """Whatever the text begins with, as far as a tokenizer lets it."""
    encoder = encoder_of(name)
    starts = ("hello", "1 2", "\u2581x", "\ud83d\ude00", "-", "Human user:", "<think>", ".\n.")
    sequences = [encoder.encode(replace(BOTH, prompt=text), Mode.DIRECT) for text in starts]
    head = decode(encoder, sequences[0].tokens[: sequences[0].shared])
    assert "Response harm: harmful" in head
    for sequence in sequences:
        assert common_length(sequence.tokens, sequences[0].tokens) >= sequence.shared - 1
        assert sequence.shared < np.argmax(sequence.loss_mask)
        prompt = encoder.prompt(replace(BOTH, prompt="Bread?"), Mode.DIRECT, asks=tuple(q for q, _ in sequence.answers))
        assert sequence.shared - 1 <= prompt.shared <= sequence.shared
        assert prompt.ids[: prompt.shared] == sequence.tokens[: prompt.shared].tolist()
    other = encoder.encode(BOTH, Mode.REASONING)
    assert common_length(other.tokens, sequences[0].tokens) < other.shared - 1


def test_with_the_format_last_both_modes_share_the_exchange(encoder):
    last = replace(encoder, dialogue=replace(encoder.dialogue, format_last=True))
    direct, reasoning = (last.encode(BOTH, mode) for mode in (Mode.DIRECT, Mode.REASONING))
    assert BOTH.response in decode(last, direct.tokens[: common_length(direct.tokens, reasoning.tokens)])


def test_there_is_always_some_text(encoder_of):
    """With longer and longer traces, the text shrinks to MIN_KEPT tokens and then the example is refused."""
    encoder = encoder_of("tiny")
    header, footer = "AI assistant:\n", "\n\n/think"
    kept = []
    for words in itertools.count():
        sequence = encoder.encode(replace(BOTH, response=LONG * 99, trace="so " * (100 + words)), Mode.REASONING)
        if sequence is None:
            break
        response = decode(encoder, sequence.tokens).split(header)[1].split(footer)[0]
        kept.append(sum(len(encoder.tokenizer(part)["input_ids"]) - 1 for part in response.split(CUT_MARK)))  # less bos
    assert kept[0] > kept[-1]
    assert MIN_KEPT <= min(kept) <= MIN_KEPT + 4


def test_prompts_leave_room_for_the_answer(encoder: Encoder):
    long = replace(BOTH, prompt=LONG * 300)
    whole, less = (encoder.prompt(long, Mode.DIRECT, answer_tokens=room) for room in (0, 150))
    assert 512 - 24 <= len(whole.ids) <= 512
    assert len(less.ids) <= 362
    assert whole.cut
    assert not encoder.prompt(BOTH, Mode.DIRECT).cut
    with pytest.raises(PromptTooLongError, match="less 500 for the answer"):
        encoder.prompt(long, Mode.DIRECT, answer_tokens=500)


def test_a_trace_that_does_not_fit_is_none(encoder: Encoder):
    wordy = replace(BOTH, trace="Because of this. " * 300)
    assert encoder.encode(wordy, Mode.REASONING) is None
    assert not [*encoder.branches(wordy, Mode.REASONING)]
    assert encoder.encode(wordy, Mode.DIRECT) is not None
    with pytest.raises(JaxguardError, match="'both' has no trace"):
        encoder.encode(replace(BOTH, trace=None), Mode.REASONING)


def test_a_megabyte_is_cut_in_linear_time(encoder: Encoder):
    example = replace(BOTH, prompt="<|eot_id|>" * 100_000, response="\u0301a" * 500_000)
    start = time.perf_counter()
    assert encoder.encode(example, Mode.DIRECT).cut
    # Quadratic work would take hours; the limit only has to hold on a busy machine.
    assert time.perf_counter() - start < 30


def test_texts_cut_before_they_are_tokenised_are_cut(encoder_of, monkeypatch):
    monkeypatch.setattr("jaxguard.data.encoding.LONGEST_TOKEN", 1)
    sequence = encoder_of("tiny").encode(replace(BOTH, prompt=LONG * 30), Mode.DIRECT)
    assert sequence.cut
    assert len(sequence.tokens) < 512


def test_policy_too_long_for_the_row(encoder_of, tiny_tokenizer_folder: Path):
    encoder = encoder_of("tiny")
    rules = "Do not do anything of the kind. " * 100
    policy = Policy("wordy", rules=rules, asks=("prompt_harm",))
    needed = encoder.min_tokens(policy)
    with pytest.raises(
        JaxguardError, match=rf"data.max_seq_len=512 is too short: policy 'wordy'.* take {needed} tokens"
    ):
        Encoder.load(tiny_tokenizer_folder, data_config(), policy)
    fitting = replace(encoder, policy=policy, max_seq_len=needed)
    sequence = fitting.encode(replace(BOTH, prompt=LONG * 99, response=LONG * 99), Mode.DIRECT)
    assert sequence.cut
    assert needed - 2 * MIN_KEPT < len(sequence.tokens) <= needed
    with pytest.raises(JaxguardError, match="example 'own': policy 'own'"):
        encoder.encode(replace(BOTH, id="own", policy=rules), Mode.REASONING)


def test_an_example_uses_its_own_rules(encoder: Encoder):
    own = replace(BOTH, policy="Only talk about bread.")
    text = decode(encoder, encoder.encode(own, Mode.DIRECT).tokens)
    assert "Only talk about bread." in text
    assert "Insults" not in text


def test_the_date_is_pinned(encoder_of):
    encoder = encoder_of("tiny")
    assert f"Today: {TEMPLATE_KWARGS['date_string']}<" in encoder.template.before


def edit(folder: Path, copy: Path, file: str, **changes: object) -> Path:
    """A copy of a folder with changed entries in one JSON file; None takes an entry out."""
    shutil.copytree(folder, copy)
    tree = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
    tree = {k: v for k, v in (tree | changes).items() if v is not None}
    (copy / file).write_text(json.dumps(tree))
    return copy


SHORT = Policy("short", (Category("Insults"),))


def load_error(folder: Path) -> str:
    with pytest.raises(JaxguardError) as error:
        Encoder.load(folder, data_config(), SHORT)
    return str(error.value)


def test_folders_that_cannot_be_trained_with(tiny_tokenizer_folder: Path, tmp_path: Path):
    tiny, config = tiny_tokenizer_folder, "tokenizer_config.json"
    template = json.loads((tiny / config).read_text())["chat_template"]
    assert "has no tokenizer" in load_error(tmp_path)
    assert "has no chat template" in load_error(edit(tiny, tmp_path / "a", config, chat_template=None))
    broken = edit(tiny, tmp_path / "b", config, chat_template="{{ raise_exception('no') }}")
    assert "does not render one user turn: no" in load_error(broken)
    thinks = template.replace(
        '"<|start_header_id|>assistant<|end_header_id|>\\n\\n"', '"<|start_header_id|>assistant<think>"'
    )
    assert "answer where generation starts" in load_error(edit(tiny, tmp_path / "c", config, chat_template=thinks))
    endless = template.replace('| trim + "<|eot_id|>"', "| trim")
    assert "does not end an answer" in load_error(edit(tiny, tmp_path / "d", config, chat_template=endless))
    small = edit(tiny, tmp_path / "e", "config.json", model_type="llama", vocab_size=510)
    assert all(word in load_error(small) for word in ("2 of", "510", "config.json"))
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "tokenizer.json").write_text("{")
    assert "cannot read its tokenizer" in load_error(tmp_path / "f")


@pytest.mark.parametrize("kept", [(), ("<|end_header_id|>",)])
def test_control_tokens_that_would_be_spelled_as_text_are_refused(tiny_tokenizer_folder: Path, tmp_path: Path, kept):
    """The tokens of tokenizer_config.json, bos and eos, are added anyway; of the template's others, one is missing or two are."""
    added = json.loads((tiny_tokenizer_folder / "tokenizer.json").read_text())["added_tokens"]
    added = [token for token in added if token["content"] in kept]
    message = load_error(edit(tiny_tokenizer_folder, tmp_path / "a", "tokenizer.json", added_tokens=added))
    assert all(word in message for word in (str(tmp_path / "a"), "'<|start_header_id|>'", "added_tokens"))
    assert ("'<|end_header_id|>'" in message) == (not kept)


def test_generation_must_stop_at_the_end_of_turn(tiny_tokenizer_folder: Path, tmp_path: Path):
    other = edit(tiny_tokenizer_folder, tmp_path / "a", "tokenizer_config.json", eos_token="<|pad|>")
    Encoder.load(other, data_config(), SHORT)  # generation_config.json still stops there
    (other / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert "'<|eot_id|>' (4), where generation does not stop" in load_error(other)


def test_a_template_that_changes_the_turn_is_an_error(tiny_tokenizer_folder: Path, tmp_path: Path):
    config = "tokenizer_config.json"
    template = json.loads((tiny_tokenizer_folder / config).read_text())["chat_template"]
    upper = template.replace('message["content"] | trim', 'message["content"] | replace("Judge", "")')
    folder = edit(tiny_tokenizer_folder, tmp_path / "a", config, chat_template=upper)
    with pytest.raises(JaxguardError, match="changes the user turn"):
        Encoder.load(folder, data_config(), replace(SHORT, instruction="Judge this."))
