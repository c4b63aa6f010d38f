"""Code blocks of the documents: Python parses and its names exist, YAML is read by its schema or at least parses, JSON parses."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").rglob("*.md")])
FENCE = re.compile(r"^( *)(`{3,})([a-z]*)\n(.*?)\n\1\2 *$", re.MULTILINE | re.DOTALL)
KNOWN = {"sh", "python", "yaml", "json", ""}


def blocks(language):
    """The text of every block in that language, by document and number."""
    texts = []
    for document in DOCUMENTS:
        for number, match in enumerate(FENCE.finditer(document.read_text(encoding="utf-8")), 1):
            if match[3] == language:
                text = "\n".join(line.removeprefix(match[1]) for line in match[4].splitlines())
                texts.append(pytest.param(text, id=f"{document.relative_to(ROOT)}-{number}"))
    return texts


def test_every_block_names_a_language_that_is_checked():
    for document in DOCUMENTS:
        for match in FENCE.finditer(document.read_text(encoding="utf-8")):
            assert match[3] in KNOWN, f"{document}: {match[3]}"


@pytest.mark.parametrize("text", blocks("python"))
def test_python_parses_and_imports_what_exists(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxguard":
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jaxguard":
            assert hasattr(importlib.import_module("jaxguard"), node.attr)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_parses(text):
    assert yaml.safe_load(text)


@pytest.mark.parametrize("text", blocks("json"))
def test_json_parses(text):
    for value in [text] if text.lstrip().startswith(("{\n", "[")) else text.splitlines():
        assert json.loads(value)
