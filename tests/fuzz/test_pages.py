"""Pages × payloads in Chromium: every HTML page that jaxguard writes, with markup in every text, runs none of it.

Nor does a page whose markup was not escaped: then its content security policy stands.
"""

import json
import random
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import report_examples
import yaml
from browser import complaints, open_page, requests
from campaign import rounds
from page_examples import GOOD, SETTINGS
from plan_examples import plan_of

from jaxguard.distill.page import write_store_page
from jaxguard.distill.store import open_traces
from jaxguard.evaluate import audit
from jaxguard.evaluate.report.page import report
from jaxguard.evaluate.report.published import read_published
from jaxguard.plan.run import PlanReport, Refusal, plan_json
from jaxguard.plan.run_cost import RunCost
from jaxguard.plan.sweeps import SweepReport
from jaxguard.report import (
    Beside,
    Bullets,
    Cell,
    Code,
    Details,
    Drawing,
    Facts,
    Page,
    Paragraph,
    Quote,
    Section,
    Table,
    Tiles,
    note,
    write_page,
)
from jaxguard.study.grid import open_study
from jaxguard.study.report import write_report

ROOT = Path(__file__).parents[2]
RUN = "window.hacked=1"
PAYLOADS = (
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</title></head><body onload='{RUN}'>",
    f"<img src=x onerror='{RUN}'>",
    f'"><img src=x onerror="{RUN}">',
    f"' autofocus tabindex=1 onfocus='{RUN}' x='",
    f'" autofocus tabindex=1 onfocus="{RUN}" x="',
    f"` onmouseover=`{RUN}`",
    f"<svg onload={RUN}>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"</svg><svg><script>{RUN}</script></svg>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={RUN}>",
    f"<details open ontoggle={RUN}>",
    f"</pre></details></div><iframe srcdoc='<script>parent.{RUN.removeprefix('window.')}</script>'></iframe>",
    f'<iframe src="javascript:parent.{RUN.removeprefix("window.")}"></iframe>',
    f"<object data='data:text/html,<script>{RUN}</script>'></object><embed src='javascript:{RUN}'>",
    f"<a href='javascript:{RUN}' id=trap>x</a>",
    f"[x](javascript:{RUN}) ![x](http://127.0.0.1:9/x)",
    f"javascript:{RUN}//http://127.0.0.1:9/",
    "<link rel=stylesheet href=http://127.0.0.1:9/x><style>@import 'http://127.0.0.1:9/y';</style>",
    "<base href=http://127.0.0.1:9/><form action=http://127.0.0.1:9/><input autofocus></form>",
    f"<!--<script>{RUN}--><script>{RUN}</script>",
    f"]]><script>{RUN}</script><![CDATA[",
    f"{{{{ 7 * 7 }}}}{{% raw %}}{{% endset %}}<script>{RUN}</script>",
    f"$\\href{{javascript:{RUN}}}{{x}}$ \u2028{RUN}\u2029 \ud800 \x00<script>{RUN}</script>",
    f"&lt;script&gt;{RUN}&lt;/script&gt; &#60;script&#62;{RUN}&#60;/script&#62;",
    f"<template><script>{RUN}</script></template><noscript><img src=x onerror={RUN}></noscript>",
)


def poison(tree, text, keep=()):
    """The tree with a text before every string in it, but for the fields to keep; equal strings stay equal."""
    match tree:
        case str():
            return f"{text} {tree}"
        case list() | tuple() if not hasattr(tree, "_fields"):
            return type(tree)(poison(each, text, keep) for each in tree)
        case dict():
            return {poison(key, text, keep): poison(value, text, keep) for key, value in tree.items()}
        case _ if is_dataclass(tree):
            names = [each.name for each in fields(tree) if each.init and each.name not in keep]
            return replace(tree, **{name: poison(getattr(tree, name), text, keep) for name in names})
        case _:
            return tree


def evaluation_page(text, path):
    labels = ("mode", "question", "group", "prompt_label", "response_label", "refusal_label", "paper_rows", "settings")
    evaluation = poison(report_examples.evaluation(), text, (*labels, "averages"))
    averages = [
        replace(each, guard=f"{text} {each.guard}", versus=None, missing=(text,)) for each in evaluation.averages
    ]
    evaluation = replace(evaluation, averages=tuple(averages), settings={text: text, **report_examples.some().settings})
    write_page(path, report(replace(evaluation, left_out={text: text}), read_published()))


def audit_page(text, path):
    text = text.replace("\ud800", "")  # rows are read without halves of characters
    labels = [("prompt_harm", "harmful"), ("response_harm", "harmful"), ("response_refusal", "refusal")]
    tasks = [
        SimpleNamespace(
            labels=labels[: 1 + i % 3], example=SimpleNamespace(id=f"{text} {i}", categories=(f"{text} {i % 2}",))
        )
        for i in range(6)
    ]
    verdicts = {"prompt_harm": 0, "response_harm": 0, "response_refusal": 1}
    counts = ("unparsable", "cut", "without_reasoning", "invented_responses", "prompt_tokens", "completion_tokens")
    answer = {"verdicts": verdicts, **dict.fromkeys(counts, 1), "words": 3, "sentences": 1, "repeated_share": 0.1}
    words = ("run", "teacher", "version", "prompt", "policy", "prompt_name", "policy_name")
    about = dict.fromkeys(words, text) | {"sampling": {text: text}, "seed": 0, "samples": 2, "available": 6}
    result = audit.score(tasks, [answer | {"failed_checks": [text]}] * 12, about)
    write_page(path, audit.report(result))


def traces_page(text, path):
    failures = ({}, {text.replace("\ud800", ""): text}, {"judge": text})  # a check's name is ours
    attempts = [
        replace(
            GOOD,
            example_id=f"{text} {i}",
            trace=text,
            answer=text,
            finish_reason=text,
            failures=failures[i % 3],
        )
        for i in range(6)
    ]
    with open_traces(path.parent / "store", poison(SETTINGS, text) | {"teacher": text, "version": text}, {}) as store:
        for attempt in attempts:
            store.append(attempt)
    write_store_page(path.parent / "store", path)


def plans(text):
    plan = plan_of(61, name=text, largest=[(3 << 30, text, text)], kernels={text: 2.0}, cost=RunCost(781))
    return [replace(plan, collectives=[poison(each, text, ("kind", "axes")) for each in plan.collectives])]


def plan_page(text, path):
    write_page(path, PlanReport(plans(text), [Refusal(text, text, text, [(1 << 30, text, text)])]).page())


def sweep_page(text, path):
    result = {**plan_json(plans(text)[0]), "series": text, "efficiency": 1.0}
    results = [result | {"devices": 8}, result | {"devices": 16}, {"series": text, "devices": 32, "error": text}]
    write_page(path, SweepReport(text, results).page())


def study_page(text, path):
    shown = text.replace("\ud800", "").replace("\x00", "")  # no YAML
    definition = {
        "title": shown, "about": shown, "metric": shown, "config": "smollm_demo",
        "rows": {"a": {"series": shown}, "b": {"axes": {"data.subset": {shown: 64}}}, "c": {"axes": {"data.subset": [96, 128]}}},
        "curve": {"axis": "data.subset", "label": shown},
    }  # fmt: skip
    file = path.parent / "study.yaml"
    file.write_text(yaml.safe_dump(definition), encoding="utf-8")
    study = open_study(str(file), None, [f"run_folder={path.parent}"])
    for run in study.runs:
        (run.folder / "evaluate").mkdir(parents=True, exist_ok=True)
        (run.folder / "evaluate/results.json").touch()

    cell = replace(report_examples.some().cells[0], guard=shown, benchmark=shown, slices={})
    evaluation = replace(report_examples.some(), cells=(cell,), averages=())
    write_report(study, lambda _: evaluation, read_published())[1].rename(path)


def blocks_page(text, path):
    """One of every kind of block."""
    table = Table((text, text), text, note=text)
    table.add(
        Cell(text, text, f"http://{text}", code=True, tone=text, bar=0.5), Cell(text, url=text), group=text, kind=text
    )
    everything = [
        text, note(text), Paragraph([text, Cell(text, text, f"https://x.org/{text}")]), Bullets([text], warning=True),
        Facts([(text, text)]), Tiles([(text, text, text)]), Code(text, text), Drawing(text, None), Quote(text, text, rest=text),
        table,
    ]  # fmt: skip
    inner = [Details(text, everything), Beside(everything), Section(text, everything, text)]
    write_page(path, Page(text, [*everything, Section(text, inner, text), Section(text, inner, text)]))


PAGES = {
    "evaluation": evaluation_page,
    "audit": audit_page,
    "traces": traces_page,
    "plan": plan_page,
    "sweep": sweep_page,
    "study": study_page,
    "blocks": blocks_page,
}
ACT = """
for (const each of document.querySelectorAll("details")) each.open = true;
for (const each of document.querySelectorAll("[tabindex], a, summary")) {
  each.focus();
  each.dispatchEvent(new Event("mouseover"));
}
document.getElementById("trap")?.click();
"""
STRANGE = "img, iframe, object, embed, base, form, math, template, noscript, a[href^='javascript'], [onload], [onerror]"
SEEN = f"""return [window.hacked ?? null, document.scripts.length, document.querySelectorAll("{STRANGE}").length,
    document.querySelectorAll("meta").length, document.querySelectorAll("style, link").length]"""


def chosen(name):
    """The payloads of a page: all of them, or a seeded sample."""
    return random.Random(f"pages {name}").sample(PAYLOADS, rounds(1, len(PAYLOADS)))


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", PAGES)
def test_no_page_runs_a_text(browser, tmp_path, name):
    for i, text in enumerate(chosen(name)):
        (tmp_path / str(i)).mkdir()
        path = tmp_path / str(i) / "page.html"
        PAGES[name](text, path)
        open_page(browser, path)
        browser.execute_script(ACT)
        scripts = 1 if name == "traces" else 0
        assert browser.execute_script(SEEN) == [None, scripts, 0, 5, 2], text
        assert (complaints(browser), requests(browser)) == ([], []), text


@pytest.mark.parametrize("name", PAGES)
def test_the_policy_stands_where_a_text_is_not_escaped(browser, tmp_path, name):
    PAGES[name]("bread", tmp_path / "plain.html")
    plain = (tmp_path / "plain.html").read_text()
    assert plain.count("</main>") == 1
    for i, text in enumerate(chosen(name)):
        broken = tmp_path / f"{i}.html"
        raw = f"{text}<p {text}>".encode("utf-8", "replace").decode()
        broken.write_text(plain.replace("</main>", f"{raw}</main>"))
        open_page(browser, broken)
        browser.execute_script(ACT)
        assert browser.execute_script("return window.hacked ?? null") is None, text
        assert sent(browser) == [], text


def sent(driver):
    """Addresses that were asked for and not refused by the page's policy, those of files left out."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    blocked = {e["params"]["requestId"] for e in events if e["params"].get("blockedReason") == "csp"}
    begun = [
        e["params"]
        for e in events
        if e["method"] == "Network.requestWillBeSent" and e["params"]["requestId"] not in blocked
    ]
    return [url for url in (each["request"]["url"] for each in begun) if not url.startswith(("file:", "data:"))]


def test_without_the_policy_the_payloads_run(browser, tmp_path):
    """So that the test above can fail."""
    ran = 0
    for i, text in enumerate(PAYLOADS[:11]):
        path = tmp_path / f"{i}.html"
        path.write_text(f"<!DOCTYPE html><title>x</title><main>{text}<p {text}></main>")
        open_page(browser, path)
        browser.execute_script(ACT)
        ran += browser.execute_script("return window.hacked ?? null") == 1
    assert ran >= 6


def test_every_page_has_the_same_policy(tmp_path):
    """But for the hash of its style, and of its script where it has one; no other code writes HTML."""
    policies = set()
    for name, write in PAGES.items():
        write("bread", tmp_path / f"{name}.html")
        (policy,) = re.findall(
            r'http-equiv="Content-Security-Policy" content="([^"]*)"', (tmp_path / f"{name}.html").read_text()
        )
        assert ("script-src" in policy) == (name == "traces")
        policies.add(re.sub(r"script-src 'sha256-[\w+/=]+'; |sha256-[\w+/=]+", "", policy))
    (policy,) = policies
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-inline" not in policy.replace("style-src-attr 'unsafe-inline'", "")
    for path in (ROOT / "jaxguard").rglob("*"):
        if path.suffix in {".py", ".j2"} and path.name != "base.html.j2":
            assert not re.search(r"<html|<!doctype", path.read_text(), re.IGNORECASE), path
    templates = [path for path in (ROOT / "jaxguard").rglob("*.html.j2") if path.parent.name != "report"]
    assert all('{% extends "base.html.j2" %}' in path.read_text() for path in templates)
