"""No code of a checkpoint or a data set is ever run, and nobody is asked whether to run it."""

import ast
import builtins
import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from jaxguard.config.evaluate import ServerConfig
from jaxguard.data.format.template import load_tokenizer
from jaxguard.models.spec import read_spec
from jaxguard.utils.errors import JaxguardError

ROOT = Path(__file__).resolve().parent.parent
LOADERS = {"from_pretrained", "from_config", "load_dataset", "pipeline"}
CODE = "raise SystemExit('code of a checkpoint was run')\n"


def loading_calls(path):
    """Every call in a file that could run the code of a repository."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.func
            if (function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")) in LOADERS:
                yield node


def test_every_loading_call_refuses_remote_code():
    calls = [
        (path, call)
        for folder in ("jaxguard", "tools", "launch", "examples")
        for path in (ROOT / folder).rglob("*.py")
        for call in loading_calls(path)
    ]
    assert len(calls) > 5
    for path, call in calls:
        flags = [ast.unparse(each.value) for each in call.keywords if each.arg == "trust_remote_code"]
        assert flags == ["False"], f"{path}:{call.lineno}"


def test_no_script_or_config_trusts_remote_code():
    files = [p for folder in ("launch", "configs", "tools", "docs") for p in (ROOT / folder).rglob("*") if p.is_file()]
    for path in [*files, ROOT / "Makefile", ROOT / "README.md"]:
        flags = re.findall(r"(?i)trust[-_]remote[-_]code\W*(\w*)", path.read_text(encoding="utf-8", errors="replace"))
        assert {flag.casefold() for flag in flags} <= {"false"}, path


@pytest.fixture
def hostile(tiny_checkpoint, tmp_path, monkeypatch):
    """hostile(file, **fields): a checkpoint with these fields and code of its own; whoever is asked says yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")

    def write(file, **fields):
        folder = tmp_path / "hostile"
        shutil.copytree(tiny_checkpoint, folder)
        for module in ("config", "tokenizer"):
            (folder / f"{module}_of_its_own.py").write_text(CODE)
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    return write


AUTO_CONFIG = {"AutoConfig": "config_of_its_own.Config", "AutoModelForCausalLM": "config_of_its_own.Model"}
AUTO_TOKENIZER = {"AutoTokenizer": ["tokenizer_of_its_own.Tokenizer", "tokenizer_of_its_own.Tokenizer"]}


def test_an_unknown_model_type_runs_no_code(hostile):
    folder = hostile("config.json", model_type="its_own", auto_map=AUTO_CONFIG)
    with pytest.raises(JaxguardError, match="code of its own") as raised:
        read_spec(folder)
    assert str(folder) in str(raised.value)
    assert "trust_remote_code" not in str(raised.value)
    with suppress(JaxguardError):  # older releases of transformers read the tokenizer without the model's class
        load_tokenizer(folder)


def test_an_unknown_tokenizer_runs_no_code(hostile):
    folder = hostile("tokenizer_config.json", tokenizer_class="Its", auto_map=AUTO_TOKENIZER)
    (folder / "config.json").unlink()
    with pytest.raises(JaxguardError, match="code of its own"):
        load_tokenizer(folder)


def test_code_that_is_not_needed_is_left_alone(hostile, tiny_checkpoint):
    folder = hostile("config.json", auto_map=AUTO_CONFIG)
    assert read_spec(folder).fingerprint == read_spec(tiny_checkpoint).fingerprint
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": AUTO_TOKENIZER}))
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(tiny_checkpoint).get_vocab()


@pytest.mark.parametrize("flag", ["--trust-remote-code", "--trust-remote-code=true", "--trust_remote", "--trust"])
def test_the_server_takes_no_flag_for_it(flag):
    with pytest.raises(ValueError, match="arguments"):
        ServerConfig(arguments=("--tp-size=2", flag))
    assert ServerConfig(arguments=("--tp-size=2",)).arguments
