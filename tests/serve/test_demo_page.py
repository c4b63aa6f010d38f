"""The page on which people try texts: a text to be checked may attack it."""

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager

import httpx2
import pytest
import uvicorn
from browser import complaints, requests
from page_examples import BREAKOUTS

from jaxguard.serve import native, page
from jaxguard.serve.app import create_app

TEXT = page.PAGE.read_text(encoding="utf-8")


def test_it_is_off_unless_asked_for(served):
    async def test():
        async with served() as s:
            assert (await s.client.get("/")).status_code == 404
            transport = httpx2.ASGITransport(create_app(s.service, page.add_routes))
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.get("/")

    answer = asyncio.run(test())
    assert answer.text == TEXT
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["x-content-type-options"] == "nosniff"
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert {name for name, value in rules.items() if value == "'none'"} >= {
        "default-src",
        "base-uri",
        "form-action",
        "frame-ancestors",
        "trusted-types",
    }
    assert rules["connect-src"] == "'self'"
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", TEXT, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"


def test_nothing_is_fetched_and_texts_stay_texts():
    assert "//" not in re.sub(r"^\s*//.*$", "", TEXT, flags=re.MULTILINE), "a URL"
    assert set(re.findall(r"(?:src|href)=\"([^\"]*)\"", TEXT)) == {"data:,"}
    assert not re.search(
        r"(?i)(inner|outer|adjacent)html|document\.write|\beval|Function\(|setAttribute|srcdoc|parseFrom", TEXT
    )
    assert not re.search(r"<[^>]*\s(?:on\w+|style)=", TEXT)


@contextmanager
def running(served, **options):
    """The address of a service with the page, in a thread of its own."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    servers = []

    async def serve():
        async with served(**options) as s:
            config = uvicorn.Config(create_app(s.service, native.add_routes, page.add_routes), log_config=None)
            servers.append(uvicorn.Server(config))
            await servers[0].serve([listener])

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        servers[0].should_exit = True
        thread.join(30)
        listener.close()


def eventually(condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(None, 20, poll_frequency=0.05).until(lambda _: condition())


def visible(browser):
    return browser.execute_script("return document.body.innerText")


def script(browser, code):
    return browser.execute_script(f"return {code}")


def fill(browser, **texts):
    for name, text in texts.items():
        browser.execute_script(f"document.getElementById({name!r}).value = {json.dumps(text)}")  # half surrogates too


def check(browser, **texts):
    """Check an exchange; the newest result, or the error."""
    count = len(browser.find_elements("css selector", "article"))
    fill(browser, **texts)
    browser.find_element("css selector", "[type=submit]").click()
    eventually(
        lambda: (
            browser.find_element("id", "error").is_displayed()
            or len(browser.find_elements("css selector", "article")) > count
        )
    )
    if browser.find_element("id", "error").is_displayed():
        return browser.find_element("id", "error")
    return browser.find_element("css selector", "article")


def start(browser, url):
    browser.get("about:blank")
    complaints(browser)
    requests(browser)
    browser.get(url)
    eventually(lambda: script(browser, "document.getElementById('policy').value") == "short")


@pytest.mark.slow
def test_a_check_in_the_browser(browser, served, guard):
    with running(served) as url:
        start(browser, url)
        result = check(browser, prompt="How do I bake bread?", response="With harm.")
        assert "Harmful: does not pass" in result.text
        assert "Prompt harmful: unharmful" in result.text
        assert "Response harmful: harmful" in result.text
        assert [bar.size["width"] for bar in result.find_elements("css selector", ".bar div")][1] > 100
        assert [each.get_attribute("class") for each in result.find_elements("css selector", ".bar div")] == [
            "",
            "over",
        ]

        text, button = (result.find_elements("css selector", each)[-1] for each in (".text", "button"))
        assert "blur" in text.value_of_css_property("filter")
        assert text.get_attribute("aria-hidden") == "true"
        button.click()
        assert text.value_of_css_property("filter") == "none"
        assert text.get_attribute("aria-hidden") == "false"
        assert text.text == "With harm."
        assert "blur" in browser.find_element("id", "prompt").value_of_css_property("filter")
        browser.find_element("id", "prompt").click()
        assert browser.find_element("id", "prompt").value_of_css_property("filter") == "none"

        folded = result.find_element("css selector", "details")
        assert "short: How" not in visible(browser)
        folded.find_element("css selector", "summary").click()
        assert "short: How do I bake bread?" in visible(browser)

        result = check(browser, prompt="words", response="")
        assert "no probability" in result.text
        assert result.text.startswith("Passes")
        assert "too long" in check(browser, prompt="cut").text
        assert browser.find_element("css selector", "article h2").text == "Does not pass"
        assert complaints(browser) == []
        assert all(address.startswith(url) for address in requests(browser))


@pytest.mark.slow
def test_nothing_hostile_runs(browser, served, guard):
    with running(served) as url:
        start(browser, url)
        for text in BREAKOUTS:
            result = check(browser, prompt=text, response=text)
            assert result.tag_name == "article"
            for summary in result.find_elements("css selector", "summary"):
                summary.click()
            for button in result.find_elements("css selector", "button"):
                button.click()
            texts = "[...document.querySelector('article').querySelectorAll('.text')].slice(1).map(each => each.textContent)"
            assert script(browser, f"{texts}.every(each => each === {json.dumps(text)})"), text
        assert script(browser, "window.hacked") is None
        assert script(browser, "document.images.length") == 0
        assert complaints(browser) == []
        assert all(address.startswith(url) for address in requests(browser))


@pytest.mark.slow
def test_errors_are_no_pass(browser, served, guard, tmp_path):
    key = "k" * 32
    digest = hashlib.sha256(key.encode()).hexdigest()
    (tmp_path / "keys.yaml").write_text(f"keys: [{{name: me, sha256: {digest}, checks_per_second: 0.001, burst: 1}}]")
    with running(served, keys=tmp_path / "keys.yaml") as url:
        browser.get(url)
        eventually(lambda: "no_key" in visible(browser))
        browser.find_element("id", "key").send_keys(key + "\n")
        eventually(lambda: script(browser, "document.getElementById('policy').value") == "short")
        assert not browser.find_element("id", "error").is_displayed()
        assert check(browser, prompt="bread").tag_name == "article"
        error = check(browser, prompt="bread")
        assert "rate_limit" in error.text
        assert "try again in" in error.text
        assert len(browser.find_elements("css selector", "article")) == 1
    browser.find_element("css selector", "[type=submit]").click()
    eventually(lambda: "does not answer" in browser.find_element("id", "error").text)
    assert len(browser.find_elements("css selector", "article")) == 1
