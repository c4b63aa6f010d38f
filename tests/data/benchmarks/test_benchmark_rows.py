"""Where the rows of a benchmark are read: copies in files and folders, the hub, an address."""

import io
import json
import lzma
import shutil
import urllib.error
import urllib.request

import huggingface_hub
import pytest
from benchmark_examples import ROWS, answers, shipped

from jaxguard.data.benchmarks.loading import load_benchmark
from jaxguard.data.benchmarks.schema import read_benchmark
from jaxguard.utils.errors import JaxguardError


def test_local_copies_in_folders(write, tmp_path):
    (tmp_path / "clone/round0").mkdir(parents=True)
    write("saferlhf").rename(tmp_path / "clone/round0/test.jsonl.xz")
    assert len(shipped("saferlhf", tmp_path / "clone").examples) == 4
    shutil.rmtree(tmp_path / "clone")
    write("jbb_response", ".jsonl").rename(tmp_path / "judge-comparison.jsonl")
    assert len(shipped("jbb_response", tmp_path).examples) == 2
    write("harmbench_response").rename(tmp_path / "text_behaviors_val_set.json")
    assert len(shipped("harmbench_response", tmp_path).examples) == 3
    write("toxic_chat").rename(tmp_path / "toxic_chat.jsonl")
    assert len(shipped("toxic_chat", tmp_path).examples) == 2


def test_several_splits_in_one_file_need_to_be_told_apart(tmp_path):
    rows = [{**row, "split": "film_production"} for row in ROWS["cosapien"][0]]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    assert list(shipped("cosapien", path).slices["scenario"]) == ["film_production"]
    path.write_text(json.dumps(ROWS["cosapien"][0][0]), encoding="utf-8")
    with pytest.raises(
        JaxguardError, match=r"slices.0.*no column 'split'; give a folder with a file for each of game_"
    ):
        shipped("cosapien", path)


def test_files_of_the_hub(monkeypatch, write, tmp_path):
    asked = []
    path = tmp_path / "cached"

    def download(repository, file, **more):
        asked.append((repository, file, more))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for rows in (lzma.compress(json.dumps(ROWS["saferlhf"][0]).encode()), write("saferlhf").read_bytes()):
        path.write_bytes(rows)  # once an array in spite of its name, once lines
        benchmark = load_benchmark("saferlhf")
        assert answers(benchmark) == ROWS["saferlhf"][1]
    assert asked[0] == (
        "PKU-Alignment/PKU-SafeRLHF",
        "round0/test.jsonl.xz",
        {"repo_type": "dataset", "revision": "v0"},
    )
    path.write_bytes(lzma.compress(b'{"prompt": "A"}\n{'))
    with pytest.raises(JaxguardError, match=r"^PKU-Alignment/PKU-SafeRLHF/round0/test.jsonl.xz:2: not JSON"):
        load_benchmark("saferlhf")


def test_damaged_copies_are_named(tmp_path):
    (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(b"{}" * 100)[:-20])
    with pytest.raises(JaxguardError, match="truncated or damaged file"):
        shipped("saferlhf", tmp_path / "x.jsonl.xz")
    (tmp_path / "x.json").write_text('{"a": [1]}', encoding="utf-8")
    with pytest.raises(JaxguardError, match=r"x\.json: .*expected"):
        shipped("harmbench_response", tmp_path / "x.json")


def test_files_are_fetched_from_their_address(monkeypatch, write):
    fetched = []

    def urlopen(url, timeout):
        fetched.append(url)
        return io.BytesIO(write("openai_moderation").read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    benchmark = load_benchmark("openai_moderation")
    assert answers(benchmark) == ROWS["openai_moderation"][1]
    assert fetched == [read_benchmark("openai_moderation").source.url]


def test_an_address_out_of_reach_says_what_to_do(monkeypatch):
    def urlopen(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(JaxguardError, match=r"samples-1680.*no route.*local file"):
        load_benchmark("openai_moderation")


@pytest.mark.parametrize("name", ["saferlhf", "xstest_prompt"])
def test_a_hub_out_of_reach_says_what_to_do(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(JaxguardError, match="on disk"):
        load_benchmark(name)
