"""The model card of an export: what the hub reads of it, what it says, and what it must not say."""

import ast
import json

import pytest
import yaml
from huggingface_hub import ModelCard

from jaxguard.config import Config
from jaxguard.config.data import SourceConfig
from jaxguard.data.model_card import Metric, Named, Score, add_scores, base_licence, base_model, named_card, write_card
from jaxguard.data.questions import Ask
from jaxguard.utils.errors import JaxguardError

CONFIG = Config.model_validate(
    {
        "name": "tiny_guard",
        "run_folder": "/secret/runs",
        "model": {"checkpoint": "owner/base"},
        "data": {
            "train": [{"kind": "jsonl", "path": "/secret/x.jsonl"}],
            "mode": "dual",
            "direct_marker": "/short",
            "policy": "/secret/policy.yaml",
        },
        "evaluate": {"backend": "sglang", "server": {"arguments": ["--api-key=secret"]}},
    }
)
MANIFEST = {
    "sources": [
        {
            "kind": "jsonl",
            "files": {"/secret/x.jsonl": "abc"},
            "examples": 12,
            "role": "train",
            "examples_sha256": "f00d",
        },
        {"hub": "allenai/wildguardmix", "role": "validation", "examples": 3},
    ],
    "policy": {"name": "bread_only", "sha256": "abc"},
}
BASE = "---\nlicense: gemma\nlicense_link: https://example.org/terms\nextra: {a: 1}\n---\n# Base\n"
ASKED = Ask(("prompt_harm", "response_harm"), ("prompt_harm", "response_harm"), True)


def card(tmp_path, base="owner/base", readme=BASE, files={}, **options):  # noqa: B006
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    output.mkdir()
    for name, text in {**({"README.md": readme} if readme else {}), **files}.items():
        (source / name).write_text(text)
    checkpoint = str(source) if base is None else base
    config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"checkpoint": checkpoint})})
    defaults = {"manifest": MANIFEST, "metrics": {}, "changes": "12.34% differ.", "asked": ASKED}
    write_card(output, source, config, **{**defaults, **options})
    _, front, body = (output / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body, output


def code(body):
    """The Python of the card's two blocks."""
    return [block.partition("\n````")[0].partition("\n```\n")[0] for block in body.split("python\n")[1:]]


def test_front_matter_names_base_licence_and_data(tmp_path):
    front, _, output = card(tmp_path)
    assert front["base_model"] == "owner/base"
    assert front["license"] == "gemma"
    assert front["license_link"] == "https://example.org/terms"
    assert front["datasets"] == ["allenai/wildguardmix"]
    assert front["library_name"] == "transformers"
    assert (output / "BASE_README.md").read_text() == BASE


@pytest.mark.parametrize(
    ("readme", "files", "base"),
    [
        (BASE, {}, None),
        ("---\nbase_model: owner/quantized\n---\n", {}, "owner/quantized"),
        ("---\nbase_model: [owner/a, owner/b]\n---\n", {}, "owner/a"),
        (BASE, {"config.json": json.dumps({"_name_or_path": "owner/copy"})}, "owner/copy"),
        (BASE, {"config.json": json.dumps({"_name_or_path": "/secret/copy"})}, None),
        ("---\nbase_model: owner/x\n---\n", {"jaxguard.json": json.dumps({"base": "owner/first"})}, "owner/first"),
        ("---\n: [\n---\n", {"config.json": "[", "jaxguard.json": "[]"}, None),
    ],
)
def test_a_local_base_is_named_by_its_own_files(tmp_path, readme, files, base):
    front, body, _ = card(tmp_path, None, readme, files)
    assert front.get("base_model") == base
    assert f"Fine-tuned from {base or 'source'} with" in body
    assert base_model(str(tmp_path / "source"), tmp_path / "source") == base


def test_a_base_without_a_card(tmp_path):
    front, _, output = card(tmp_path, None, None, {"LICENSE.txt": "terms"})
    assert (front["license"], front["license_link"]) == ("other", "LICENSE.txt")
    assert not (output / "BASE_README.md").exists()


@pytest.mark.parametrize("licence", ["mit", ["mit", "apache-2.0"]])
def test_licences_are_kept_as_they_are(tmp_path, licence):
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'license': licence})}---\n")
    assert base_licence(tmp_path) == {"license": licence}


def test_licence_of_a_strange_readme(tmp_path):
    for text in ("", "# no front matter", "---\n: [\n---\n", "---\n- list\n---\n", "---\nname: x\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert base_licence(tmp_path) == {"license": "other"}


def test_body_describes_recipe_data_change_and_prompt(tmp_path):
    _, body, _ = card(tmp_path)
    for text in ("12.34% differ.", "f00d", "x.jsonl", "bread_only", "learning_rate: 1.0e-06"):
        assert text in body, text


@pytest.mark.parametrize(
    ("mode", "trace", "named"), [("dual", "full", True), ("dual", "none", False), ("direct", "full", False)]
)
def test_body_names_the_teacher_of_published_traces(tmp_path, monkeypatch, mode, trace, named):
    train = (SourceConfig(kind="nemotron_safety", trace=trace), SourceConfig(kind="nemotron_topics", trace=trace))
    data = CONFIG.data.model_copy(update={"train": train, "mode": mode})
    monkeypatch.setitem(globals(), "CONFIG", CONFIG.model_copy(update={"data": data}))
    assert card(tmp_path)[1].count("DeepSeek-R1-0528") == named


def test_body_says_what_may_be_asked_together(tmp_path):
    sets = [{"mode": "direct", "response": True, "questions": ["prompt_harm", "response_harm"], "examples": 1234}]
    _, body, _ = card(tmp_path, manifest={**MANIFEST, "train": {"questions": sets}})
    (row,) = (line for line in body.splitlines() if line.startswith("|") and "1,234" in line)
    assert "response" in row
    assert "an exchange" in row


def test_nothing_of_this_machine_is_published(tmp_path):
    _, _, output = card(tmp_path, None, "---\nlicense: mit\n---\n")
    text = (output / "README.md").read_text()
    assert "secret" not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("response", [True, False])
def test_code_for_every_program_asks_the_same(tmp_path, response):
    _, body, _ = card(tmp_path, asked=Ask(("prompt_harm",), ("prompt_harm",), response))
    with_jaxguard, with_transformers = code(body)
    ast.parse(with_jaxguard)
    tree = ast.parse(with_transformers)
    values = {
        x.targets[0].id: x.value for x in ast.walk(tree) if isinstance(x, ast.Assign) and hasattr(x.targets[0], "id")
    }
    assert ast.literal_eval(values["MODEL"]) == "tiny_guard"
    options = {x.arg: ast.literal_eval(x.value) for x in values["prompt"].keywords}
    kwargs = {"enable_thinking": True, "questions": ["prompt_harm"]}
    assert options.items() >= {**kwargs, "add_generation_prompt": True}.items()
    messages = ast.literal_eval(values["messages"])
    assert [message["role"] for message in messages] == ["user", "assistant"][: 1 + response]
    servers = [block.partition("\n```\n")[0] for block in body.split("```sh\n")[1:]]
    assert [server.split()[0] for server in servers] == ["python", "vllm"]
    for server in servers:
        request = json.loads(server.partition(" -d '")[2].rstrip().removesuffix("'"))
        assert (request["messages"], request["chat_template_kwargs"]) == (messages, kwargs)
        assert len(server.strip().splitlines()) <= 10


def test_metrics_make_one_column_a_stage(tmp_path):
    metrics = {"before": {"f1": 0.5, "n": 10.0}, "after": {"f1": 0.75, "auprc": 0.8}}
    _, body, _ = card(tmp_path, metrics=metrics)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert rows[0] == "| metric | before | after |"
    assert rows[2:5] == ["| f1 | 0.5000 | 0.7500 |", "| n | 10.0000 | – |", "| auprc | – | 0.8000 |"]


def result(dataset, f1, task="Prompt harm"):
    return Score(
        task=Named(type="text-classification", name=task),
        dataset=Named(type=f"owner/{dataset}", name=dataset),
        metrics=[Metric(type="f1", name="F1", value=f1)],
    )


def test_scores_are_added_and_replaced(tmp_path):
    _, before, output = card(tmp_path, changes="## Benchmarks\n\n---\nnone")
    add_scores(output, [result("a", 0.5), result("b", 0.25)])
    add_scores(output, [result("a", 0.75)])
    text = (output / "README.md").read_text()
    read = ModelCard.load(output / "README.md").data
    assert read.model_name == "output"
    assert {(r.dataset_type, r.metric_type, r.metric_value) for r in read.eval_results} == {
        ("owner/a", "f1", 0.75),
        ("owner/b", "f1", 0.25),
    }
    assert read.base_model == "owner/base"
    kept, _, scores = text.rpartition("\n## Benchmarks\n")
    assert kept.split("---\n", 2)[2] == before.rpartition("\n## Benchmarks\n")[0]
    assert "| a | Prompt harm | 0.750 |" in scores
    assert "| b | Prompt harm | 0.250 |" in scores


@pytest.mark.parametrize("text", [None, "# Another's card\n", "---\nlicense: mit\n---\n# Another's\n"])
def test_another_card_is_left_alone(tmp_path, text):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    add_scores(tmp_path, [result("a", 0.5)])
    assert (tmp_path / "README.md").exists() == (text is not None)
    assert text is None or (tmp_path / "README.md").read_text() == text


def test_scores_that_a_hand_broke_are_a_mistake(tmp_path):
    _, _, output = card(tmp_path)
    path = output / "README.md"
    path.write_text(path.read_text().replace("license: gemma", "license: gemma\nmodel-index: [{name: x}]"))
    with pytest.raises(JaxguardError, match=r"README\.md: .*0\.results"):
        add_scores(output, [result("a", 0.5)])


def test_an_uploaded_card_names_its_repository(tmp_path):
    _, _, output = card(tmp_path)
    (output / "jaxguard.json").write_text(json.dumps({"name": "tiny_guard"}))
    text = named_card(output, "me/my-guard")
    assert text.count('MODEL = "me/my-guard"') == 2
    assert 'MODEL = "tiny_guard"' not in text
    assert text.replace("me/my-guard", "tiny_guard") == (output / "README.md").read_text()
