"""The command: what it reads, what it prints, how it ends."""

import io
import json

import pytest
from fake_guard import add_points

from jaxguard.check.__main__ import main, read_inputs
from jaxguard.cli import main as jaxguard
from jaxguard.utils.errors import JaxguardError


@pytest.fixture
def command(run, guard, capsys):
    """command(*arguments): (exit code, stdout, stderr)."""

    def command(*arguments):
        code = main(["--model", str(run), *arguments])
        return code, *capsys.readouterr()

    return command


def test_a_text(command):
    assert command("How do I bake bread?") == (0, "Prompt harm  unharmful   0.250\n", "")


def test_harm_and_what_cannot_be_read_are_code_1(command, guard):
    guard.says = lambda ask: "Prompt harm: unharmful\nResponse harm: harmful"
    code, out, _ = command("--response", "Gladly.", "bread?")
    assert (code, out.splitlines()[1]) == (1, "Response harm  harmful     0.125")
    guard.says = lambda ask: "I would rather not say."
    code, out, _ = command("bread?")
    assert (code, out.splitlines()[0]) == (1, "Prompt harm  harmful     0.250")
    assert "prompt_harm: 'I would rather not say.'" in out.splitlines()[1]


def test_markup_and_control_characters_are_shown_as_text(command, guard, tmp_path):
    guard.says = lambda ask: "<think>[red]bread[/red] \x1b[2J</think>Prompt harm: unharmful"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "[b]1", "prompt": "[/i]\x1b]0;x\nbread"}), encoding="utf-8")
    code, out, err = command("--mode", "reasoning", "--file", str(tmp_path / "rows.jsonl"))
    assert out == "[b]1: [/i]\ufffd]0;x bread\nPrompt harm  unharmful   0.250\n  [red]bread[/red] \ufffd[2J\n"
    assert (code, err.splitlines()[0]) == (0, "note: this model was trained to answer in direct mode only")


def test_a_text_without_quotes_is_said_so(command):
    code, _, error = command("How", "do", "I", "bake?")
    assert code == 2
    assert "'do': quote a text" in error


@pytest.mark.parametrize("text", ["--file=/etc/hostname", "--help", "--json", "-v"])
def test_what_follows_two_dashes_is_text(command, guard, text):
    """A script that checks messages of others has a safe way to pass one."""
    seen = []
    guard.says = lambda ask: seen.append(ask.example.prompt) or "Prompt harm: unharmful"
    assert command("--", text)[0] == 0
    assert text in seen[0]


def test_json_lines(command, guard):
    guard.says = lambda ask: "Prompt harm: harmful"
    code, out, _ = command("--json", "bröd?")
    assert code == 1
    assert json.loads(out) == {
        "id": "1",
        "prompt_harm": "harmful",
        "response_harm": None,
        "response_refusal": None,
        "passes": False,
        "probabilities": {"prompt_harm": 0.25},
        "decided_by": "direct",
        "direct_probabilities": {},
        "operating_point": "words",
        "thresholds": {"prompt_harm": None},
        "reasoning": None,
        "problems": [],
        "seconds": 0.5,
    }
    assert out.isascii()


def test_an_operating_point_is_shown(command, run):
    add_points(run)
    code, out, _ = command("bread?")
    assert (code, out) == (1, "Prompt harm  harmful     0.250  threshold 0.200 (f1)\n")
    code, out, _ = command("--operating-point", "0.05", "--json", "bread?")
    tree = json.loads(out)
    assert (code, tree["operating_point"], tree["thresholds"]) == (0, "0.05", {"prompt_harm": 0.3})
    assert command("--operating-point", "0.06", "bread?")[0] == 2


def test_files_are_judged_in_order_and_one_harm_is_enough(command, guard, tmp_path):
    guard.says = lambda ask: f"Prompt harm: {'harmful' if ask.example.prompt == 'b' else 'unharmful'}"
    (tmp_path / "lines.txt").write_text("a\n\nb\nc\n", encoding="utf-8")
    code, out, err = command("--json", "--file", str(tmp_path / "lines.txt"))
    assert [(row["id"], row["passes"]) for row in map(json.loads, out.splitlines())] == [
        ("1", True),
        ("2", False),
        ("3", True),
    ]
    assert code == 1
    assert "checking" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either a text or --file"),
        (["a", "--file", "b.txt"], "give either a text or --file"),
        ([" "], "the text is empty"),
        (["--file", "nowhere.jsonl"], "no data file or folder nowhere.jsonl"),
        (["--policy", "nosuch", "a"], "no policy 'nosuch'"),
        (["--file", "{}/rows.csv"], "no column 'prompt'; rename the column"),
        (["--file", "{}/near.csv"], "no column 'prompt'; did you mean 'prompts'? it has: prompts, label"),
        (["--file", "{}/rows.cvs"], "but 'rows.csv'"),
        (["--polcy", "x", "a"], "unknown option '--polcy'; did you mean '--policy'? known: --config, --file"),
    ],
)
def test_mistakes_are_code_2(command, guard, tmp_path, arguments, words):
    (tmp_path / "rows.csv").write_text("text,label\na,safe\n", encoding="utf-8")
    (tmp_path / "near.csv").write_text("prompts,label\na,safe\n", encoding="utf-8")
    code, out, err = command(*(argument.format(tmp_path) for argument in arguments))
    assert (code, out) == (2, "")
    assert words in err
    assert not guard.opened


def test_it_is_a_stage(run, guard, capsys):
    assert jaxguard(["check", "--model", str(run), "bread?"]) == 0
    assert jaxguard([]) == 0
    assert "check" in capsys.readouterr().out


def test_help_names_the_policies(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "novel/book_spoilers" in capsys.readouterr().out


def lines(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    return [(e.id, e.prompt, e.response) for e in read_inputs("-", None, None)]


def test_standard_input(monkeypatch):
    assert lines(monkeypatch, "a\n b \n\n") == [("1", "a", None), ("2", "b", None)]
    assert lines(monkeypatch, '\n{"prompt": "a", "response": "b", "id": 7}\n') == [("7", "a", "b")]
    with pytest.raises(JaxguardError, match="standard input:2: not JSON"):
        lines(monkeypatch, '{"prompt": "a"}\nb\n')
    with pytest.raises(JaxguardError, match=r"standard input:2: no column 'prompt'.* it has: response"):
        lines(monkeypatch, '{"prompt": "a"}\n{"response": "b"}\n')
    with pytest.raises(JaxguardError, match="standard input holds no text"):
        lines(monkeypatch, "\n")


def test_only_line_feeds_separate_messages(monkeypatch, tmp_path):
    for mark in ("\u2028", "\u2029", "\x85", "\v", "\f", "\r", "\x1c", "\x1d", "\x1e"):
        message = f"How do I bake{mark}rye bread?"
        (tmp_path / "lines.txt").write_bytes(f"{message}\r\nRye?\n".encode())
        expected = [("1", message, None), ("2", "Rye?", None)]
        found = read_inputs(None, None, str(tmp_path / "lines.txt"))
        assert [(e.id, e.prompt, e.response) for e in found] == expected, repr(mark)
        assert lines(monkeypatch, f"{message}\r\nRye?\n") == expected, repr(mark)
        row = json.dumps({"prompt": message}, ensure_ascii=False)
        (tmp_path / "lines.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8", newline="")
        assert [e.prompt for e in read_inputs(None, None, str(tmp_path / "lines.jsonl"))] == [message, message]
        assert lines(monkeypatch, f"{row}\n{row}\n") == [("1", message, None), ("2", message, None)]


def test_text_that_is_not_utf8_is_said_so(monkeypatch, tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"br\xf6d\n")
    with pytest.raises(JaxguardError, match=r"lines\.txt: not UTF-8"):
        read_inputs(None, None, str(tmp_path / "lines.txt"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"br\xf6d\n"), encoding="utf-8"))
    with pytest.raises(JaxguardError, match="standard input: not UTF-8"):
        read_inputs("-", None, None)


def test_what_was_not_judged_is_code_1(command, guard, tmp_path):
    (tmp_path / "prompts.yaml").write_text("name: prompts\nrules: x\nasks: [prompt_harm]\n", encoding="utf-8")
    policy = ("--policy", str(tmp_path / "prompts.yaml"))
    code, out, _ = command(*policy, "--response", "Bake it.", "bread?")
    assert code == 1
    assert "the response was not judged" in out
    code, out, _ = command(*policy, "--json", "--response", "Bake it.", "bread?")
    assert (code, json.loads(out)["passes"], len(json.loads(out)["problems"])) == (1, False, 1)
    assert command(*policy, "bread?")[0] == 0
    (tmp_path / "responses.yaml").write_text("name: responses\nrules: x\nasks: [response_harm]\n", encoding="utf-8")
    code, out, _ = command("--policy", str(tmp_path / "responses.yaml"), "bread?")
    assert (code, len(guard.asks)) == (1, 3)
    assert "the prompt was not judged" in out
    assert "give the response" in out


def test_tables_and_what_they_say_of_a_policy(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response,policy,prompt_label\na,,All is fine.,harmful\n", encoding="utf-8")
    [example] = read_inputs(None, None, str(path))
    assert (example.prompt, example.response, example.policy, example.prompt_label) == ("a", None, None, None)
