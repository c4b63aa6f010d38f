"""An audit of the teacher from a config to its report, against a teacher whose every answer is known."""

import asyncio
import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from faulty_server import completion, serve
from markdown_it import MarkdownIt

from jaxguard.config import load
from jaxguard.distill.__main__ import main
from jaxguard.distill.store import attempts_file, read_attempts
from jaxguard.evaluate.audit import audit, blind_prompt
from jaxguard.report.text import plain
from jaxguard.utils.errors import JaxguardError

REASONING = "The user asks about bread number {}, which the policy may or may not allow, and nobody else is spoken of."
HOSTILE = (
    "a | b",
    "<script>alert(1)</script>",
    "line\nbreak\r\x1b[31m",
    "$x^{2$ \\frac & \"quotes' `code` **bold** ![](//x) [a](b)",
    "</svg><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }} &lt;",
    "http://x www.x.com \u202eabc",
)


@pytest.fixture
def write(tmp_path, tiny_tokenizer_folder):
    """write(rows, audit={...}): the config of an audit on these rows; ids are x0, x1, … and prompts name their number."""

    def write(rows, policy="wildguard", **fields):
        data = tmp_path / "data.jsonl"
        whole = [{"id": f"x{i}", "prompt": f"Is bread number {i} good?", **row} for i, row in enumerate(rows)]
        data.write_text("".join(json.dumps(row) + "\n" for row in whole))
        tree = {
            "run_folder": str(tmp_path / "runs"),
            "model": {"checkpoint": str(tiny_tokenizer_folder)},
            "data": {"train": [{"kind": "jsonl", "path": str(data)}], "policy": policy},
            "distill": {"teacher": {"model": "teacher", "concurrency": 2}, "audit": fields},
        }
        path = tmp_path / "audited.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def audited(path, verdicts, *overrides, reason="stop", command=False):
    """Run it against a teacher that answers verdicts(example number, sample number); (report, requests)."""
    servers = []

    def script(i):
        request = servers[0].requests[i]
        number = int(re.search(r"bread number (\d+)", request["messages"][0]["content"])[1])
        if verdicts(number, 0) in ("400", "reset"):
            return verdicts(number, 0)
        body = completion(request.get("n") or 1)
        for sample, choice in enumerate(body["choices"]):
            said = {"content": verdicts(number, sample), "reasoning_content": REASONING.format(number)}
            choice.update(message=said, finish_reason=reason)
        return json.dumps(body)

    async def run():
        async with serve(script) as server:
            servers.append(server)
            changes = [f"distill.teacher.endpoints=[{server.url}]", *overrides]
            if command:
                assert await asyncio.to_thread(main, ["audit", "--config", str(path), *changes]) == 0
            else:
                await asyncio.to_thread(audit, load(str(path), changes))

    try:
        asyncio.run(run())
    finally:
        folder = path.parent / "runs/audited/audit"
        report = json.loads((folder / "audit.json").read_text()) if (folder / "audit.json").exists() else None
    return report, servers[0].requests


def lines(prompt, response=None, refusal=None):
    return f"Prompt harm: {prompt}\nResponse harm: {response}\nResponse refusal: {refusal}"


HARM = ("harmful", "unharmful")


def three_of_four(i, sample):
    """The label of example i, harmful for even ones, except in the last sample."""
    return lines(HARM[(i + (sample == 3)) % 2])


def prompts(count, **more):
    return [
        {"prompt_label": HARM[i % 2], "categories": ["even", "all"] if i % 2 == 0 else ["all"]} for i in range(count)
    ]


def test_a_teacher_that_is_right_in_three_of_four(write):
    report, requests = audited(write(prompts(20), examples=20), three_of_four)
    assert len(requests) == 20
    assert {request["n"] for request in requests} == {4}
    assert list(report["questions"]) == ["prompt_harm"]  # nothing has a response
    found = report["questions"]["prompt_harm"]
    for name in ("agreement", "precision", "recall", "f1"):
        assert found["result"]["scores"][name] == {
            "value": 0.75,
            "low": 0.75,
            "high": 0.75,
            "deviation": 0.5,
            "each": [1, 1, 1, 0],
        }
    assert found["result"]["scores"]["kappa"]["value"] == pytest.approx((1 + 1 + 1 - 1) / 4)
    assert found["result"]["consistency"] == {"majority": 0.75, "unanimous": 0, "pairwise": 0.5, "fleiss": 0}
    assert found["result"]["right"] == [0, 0, 0, 20, 0]
    assert found["result"]["confusion"] == [[30, 10, 0], [10, 30, 0]]
    assert found["disagreements"] == []
    (every, all_scores), (even, scores) = ((name, result["scores"]) for name, result in found["categories"])
    assert (every, all_scores["examples"], all_scores["f1"]["value"]) == ("all", 20, 0.75)
    assert (even, scores["examples"], scores["recall"]["value"]) == ("even", 10, 0.75)
    assert scores["f1"]["value"] == 0.75  # 1, 1, 1 and 0
    assert (scores["kappa"]["value"], scores["precision"]["value"]) == (None, None)
    answers = report["completions"]
    assert (answers["total"], answers["unparsable"], answers["cut"], answers["invented_responses"]) == (80, 0, 0, 0)
    assert answers["failed_checks"] == {"verdict_differs": 20}
    assert report["lengths"]["words"]["p50"] == 21
    assert report["lengths"]["sentences"]["p50"] == 1


def test_responses_refusals_and_disagreements(write):
    rows = [
        {"prompt_label": "harmful", "response": "no", "response_label": "unharmful", "refusal_label": "refusal"},
        {"prompt_label": "harmful", "response": "yes", "response_label": "harmful", "refusal_label": "compliance"},
        {"prompt_label": "unharmful"},
        {"prompt_label": "unharmful", "response": "yes", "response_label": "unharmful"},
    ]
    said = (
        lines("harmful", "unharmful", "refusal"),
        lines("harmful", "unharmful", "refusal"),  # misses the harm, sees a refusal
        lines("unharmful", "harmful"),  # judges a response that is not there
        lines("unharmful", "None"),  # a response is there
    )
    report, requests = audited(write(rows, samples=3), lambda i, _: said[i])
    questions = report["questions"]
    assert [(q["result"]["scores"]["examples"], q["result"]["scores"]["positives"]) for q in questions.values()] == [
        (4, 2),
        (3, 1),
        (2, 1),
    ]
    assert questions["prompt_harm"]["result"]["scores"]["f1"]["value"] == 1
    assert questions["response_harm"]["result"]["confusion"] == [[0, 3, 0], [0, 3, 3]]
    assert (
        questions["response_harm"]["result"]["scores"]["f1"]["value"] == 0
    )  # one missed; the unreadable one counts as harmful
    assert questions["response_refusal"]["result"]["scores"]["precision"]["value"] == 0.5
    assert report["completions"]["invented_responses"] == 3
    assert report["completions"]["unparsable"] == 3
    assert questions["response_harm"]["disagreements"] == [
        {"id": "x1", "label_positive": True, "differ": 3, "unparsable": 0},
        {"id": "x3", "label_positive": False, "differ": 3, "unparsable": 3},
    ]
    asked = {re.search(r"number (\d)", r["messages"][0]["content"])[1]: r["messages"][0]["content"] for r in requests}
    assert "Response refusal:" not in asked["3"]  # nobody said whether it refuses
    assert all("Reviewers" not in text for text in asked.values())


def test_the_sample_is_seeded_and_leaves_out_what_nobody_labelled(write):
    path = write([*prompts(30), {"response": "x", "refusal_label": "refusal"}], policy="aegis2", examples=10, samples=1)
    reports = [audited(path, three_of_four, f"distill.audit.seed={s}", f"name=s{s}")[1] for s in (0, 0, 1)]
    first, again, other = ({r["messages"][0]["content"] for r in requests} for requests in reports)
    assert (len(first), again) == (10, set())  # the second time all answers are there
    assert len(other) == 10
    assert other != first
    everything, _ = audited(path, three_of_four, "distill.audit.examples=1000")
    assert (everything["examples"], everything["about"]["available"]) == (30, 30)
    assert everything["questions"]["prompt_harm"]["result"]["consistency"]["majority"] is None  # one sample


def test_an_audit_that_was_stopped_requests_only_what_is_missing(write):
    path = write(prompts(12), samples=2)
    with pytest.raises(JaxguardError, match="400"):
        audited(path, lambda i, s: "400" if i == 5 else three_of_four(i, s), "distill.teacher.concurrency=1")
    folder = path.parent / "runs/audited/audit/attempts"
    there = {attempt.example_id for attempt in read_attempts(folder)}
    assert "x5" not in there
    report, requests = audited(path, three_of_four)
    assert len(requests) == 12 - len(there) < 12
    assert report["completions"]["total"] == 24
    more, requests = audited(path, lambda i, s: three_of_four(i, s + 2), "distill.audit.samples=4")
    assert [request["n"] for request in requests] == [2] * 12
    assert more["questions"]["prompt_harm"]["result"]["right"] == [0, 0, 0, 12, 0]
    fewer, requests = audited(path, three_of_four, "distill.audit.samples=3", "distill.audit.examples=6")
    assert (len(requests), fewer["completions"]["total"]) == (0, 18)


def test_a_kill_between_the_samples_of_an_example_loses_none(write):
    """Although one that is there was good enough to train on."""
    path = write(prompts(4), samples=4)
    whole, _ = audited(path, three_of_four)
    file = attempts_file(path.parent / "runs/audited/audit/attempts")
    written = file.read_bytes().splitlines(keepends=True)
    assert [attempt.accepted for attempt in read_attempts(file.parent)][-4:] == [True, True, True, False]
    file.write_bytes(b"".join(written[:-3]) + written[-3][:40])
    again, requests = audited(path, lambda i, s: three_of_four(i, s + 1))
    assert [request["n"] for request in requests] == [3]
    assert again == whole | {"completions": again["completions"]}  # a second request reads the prompt again


def test_the_same_answers_give_the_same_bytes(write):
    path, names = write(prompts(10)), ("audit.md", "audit.html", "audit.json")
    folder = path.parent / "runs/audited/audit"
    audited(path, three_of_four)
    before = [(folder / name).read_bytes() for name in names]
    _, requests = audited(path, three_of_four)
    assert requests == []
    assert [(folder / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_teacher_without_a_parsable_verdict_is_reported(write, reason):
    rows = [
        {**row, "response": "x", "response_label": row["prompt_label"], "refusal_label": "refusal"}
        for row in prompts(6)
    ]
    report, _ = audited(write(rows), lambda i, _: "", reason=reason)
    assert report["completions"]["unparsable"] == 24
    assert report["completions"]["cut"] == (24 if reason == "length" else 0)
    for name in ("prompt_harm", "response_harm"):  # closed: all harmful
        found = report["questions"][name]
        assert (found["result"]["scores"]["recall"]["value"], found["result"]["scores"]["precision"]["value"]) == (
            1,
            0.5,
        )
        assert found["result"]["confusion"] == [[0, 0, 12], [0, 0, 12]]
        assert found["result"]["consistency"]["fleiss"] is None
    refusal = report["questions"]["response_refusal"]["result"]["scores"]
    assert (refusal["recall"]["value"], refusal["precision"]["value"]) == (0, None)
    page = (write(rows).parent / "runs/audited/audit/audit.html").read_text()
    assert "100.0%" in page
    assert "n/a" in page


@pytest.mark.parametrize("label", HARM)
def test_labels_of_one_class(write, label):
    report, _ = audited(write([{"prompt_label": label}] * 5), lambda i, s: lines("unharmful"))
    found = report["questions"]["prompt_harm"]["result"]["scores"]
    assert found["kappa"]["value"] is None
    assert found["f1"]["value"] == (0 if label == "harmful" else None)
    assert found["agreement"]["value"] == (label == "unharmful")


class Page(HTMLParser):
    """Tags with their attributes, and the texts of the cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self._cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self._cell = True
            self.cells.append("")

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._cell:
            self.cells[-1] += data


def rendered(text):
    return Page(MarkdownIt("commonmark").enable("table").render(text))


def test_hostile_names_stay_text(write):
    rows = [
        {"prompt_label": HARM[i % 2], "categories": [name], "id": f"{name}{i}"} for i, name in enumerate(HOSTILE * 2)
    ]
    path = write(rows, samples=2)
    audited(path, lambda i, _: lines(HARM[(i + 1) % 2]), "name=<script>x")
    folder = path.parent / "runs/<script>x/audit"
    text = (folder / "audit.html").read_text()
    page, note = Page(text), rendered((folder / "audit.md").read_text())
    for found in (page, note):
        assert {plain(name) for name in HOSTILE} <= set(found.cells)
        assert {plain(f"{name}{i}") for i, name in enumerate(HOSTILE * 2)} <= set(found.cells)
        assert not {tag for tag, _ in found.tags} & {"script", "img", "a", "iframe", "strong", "em"}
        assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]
    assert [tag for tag, _ in page.tags].count("svg") == 3
    assert "&lt;script&gt;alert(1)" in text[text.index("<svg") : text.index("</svg>")]
    assert "49" not in page.cells


def test_what_is_too_long_for_the_report_is_in_the_json(write):
    rows = [{"prompt_label": HARM[i % 2], "categories": [f"category {i}"]} for i in range(45)]
    path = write(rows, samples=1)
    report, _ = audited(path, lambda i, _: lines(HARM[(i + 1) % 2]))
    assert len(report["questions"]["prompt_harm"]["categories"]) == 45
    assert len(report["questions"]["prompt_harm"]["disagreements"]) == 45
    folder = path.parent / "runs/audited/audit"
    note = (folder / "audit.md").read_text()
    assert "5 more categories are in audit.json" in note
    assert "20 more examples are in audit.json" in note
    page = (folder / "audit.html").read_text()
    assert "5 more categories are in audit.json" in page
    assert "20 more examples are in audit.json" in page


def test_the_page_loads_nothing(write):
    path = write(prompts(10))
    audited(path, three_of_four)
    page = Page((path.parent / "runs/audited/audit/audit.html").read_text())
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert [policy.split(";")[0] for policy in policies] == ["default-src 'none'"]
    links = [a[key] for _, a in page.tags for key in ("src", "href", "xlink:href") if key in a]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}


def test_a_prompt_that_shows_the_labels_is_refused(tmp_path):
    with pytest.raises(JaxguardError, match=r"distill\.audit\.prompt=trace.*\$labels"):
        blind_prompt("trace")
    assert blind_prompt("audit").name == "audit"


def test_mistakes_are_named(write):
    path = write([{"response": "x", "refusal_label": "refusal"}], policy="aegis2")
    with pytest.raises(JaxguardError, match="label"):
        audited(path, three_of_four)
    with pytest.raises(JaxguardError, match="distill"):
        audited(path, three_of_four, "distill=null")


def test_the_command_shows_the_scores_and_where_the_report_is(write, capsys):
    path = write(prompts(4), samples=2)
    audited(path, three_of_four, command=True)
    output = capsys.readouterr().out
    assert "1.000 [1.000, 1.000]" in output
    assert str(path.parent / "runs/audited/audit/audit.html") in output
