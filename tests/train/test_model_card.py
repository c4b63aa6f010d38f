import yaml

from jaxguard.config import Config
from jaxguard.models.hf_io.checkpoints import ExportReport
from jaxguard.train.export import base_licence, write_card

CONFIG = Config.model_validate(
    {
        "name": "tiny_guard",
        "model": {"checkpoint": "owner/base"},
        "data": {"train": [{"kind": "jsonl", "path": "x.jsonl"}], "mode": "dual", "direct_marker": "/short"},
    }
)
REPORT = ExportReport(tensors=290, carried=3, values=1_000_000, changed=123_400, dtypes=("BF16",))
BASE = "---\nlicense: gemma\nlicense_link: https://example.org/terms\nextra: {a: 1}\n---\n# Base\n"


def card(tmp_path, base="owner/base", readme=BASE, **options):
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    output.mkdir()
    if readme is not None:
        (source / "README.md").write_text(readme)
    config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"checkpoint": base})})
    manifest = {"sources": [{"sha256": "abc"}, {"hub": "allenai/wildguardmix"}]}
    defaults = {"manifest": manifest, "metrics": {}, "report": REPORT, "example": "user: hello"}
    write_card(output, source, config, **{**defaults, **options})
    _, front, body = (output / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body, output


def test_front_matter_names_base_licence_and_data(tmp_path):
    front, _, output = card(tmp_path)
    assert front["base_model"] == "owner/base"
    assert front["license"] == "gemma"
    assert front["license_link"] == "https://example.org/terms"
    assert front["datasets"] == ["allenai/wildguardmix"]
    assert front["library_name"] == "transformers"
    assert (output / "BASE_README.md").read_text() == BASE


def test_a_local_base_is_named_without_its_path(tmp_path):
    front, body, output = card(tmp_path, base="/secret/place/smollm2", readme=None)
    assert "base_model" not in front
    assert front["license"] == "other"
    assert "Fine-tuned from smollm2 with" in body
    assert not (output / "BASE_README.md").exists()


def test_body_tells_recipe_data_change_and_prompt(tmp_path):
    _, body, _ = card(tmp_path, example="user: ```hello```\nassistant: Prompt harm: unharmful")
    assert "12.34% of the 1,000,000 trained weights" in body
    assert "`/think`" in body
    assert "`/short`" in body
    assert '"sha256": "abc"' in body
    assert "learning_rate: 1.0e-06" in body
    assert "````\nuser: ```hello```" in body  # the fence is longer than the one inside


def test_metrics_make_one_column_a_stage(tmp_path):
    metrics = {"before": {"f1": 0.5, "n": 10.0}, "after": {"f1": 0.75, "auprc": 0.8}}
    _, body, _ = card(tmp_path, metrics=metrics)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert rows[0] == "| metric | before | after |"
    assert rows[2:] == ["| f1 | 0.5000 | 0.7500 |", "| n | 10.0000 | – |", "| auprc | – | 0.8000 |"]


def test_licence_of_a_strange_readme(tmp_path):
    for text in ("", "# no front matter", "---\n: [\n---\n", "---\n- list\n---\n", "---\nname: x\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert base_licence(tmp_path / "README.md") == {"license": "other"}
