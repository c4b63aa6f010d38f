"""The project's rules, checked on the files themselves."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import document_config
from generated import written
from jaxguard.cli import main, stages

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxguard"
PYTHON_FILES = sorted(p for folder in ("jaxguard", "tools", "tests") for p in (ROOT / folder).rglob("*.py"))
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").rglob("*.md")])

# A package may import its own modules and those of the packages that stand here.
BELOW = {
    "utils": set(),
    "config": {"utils"},
    "report": {"utils"},
    "data": {"utils", "config", "report"},
    "distill": {"data"},
    "models": {"utils", "config"},
    "train": {"data", "models", "report"},
    "plan": {"train", "guards"},
    "guards": {"data", "models"},
    "evaluate": {"guards", "distill"},
    "mine": {"guards"},
    "reinforce": {"train", "guards"},
    "check": {"guards"},
    "serve": {"guards"},
    "load": {"data"},
    "study": {"evaluate"},
    "push": {"data"},
    "init": set(),
    "env": set(),
}


class SizeWarning(UserWarning):
    """A file or a function that may hold more than one thing."""


def packages_below(package):
    """Every package that `package` may import: those named, and what they may import."""
    return {package}.union(*(packages_below(name) for name in BELOW[package]))


LARGE_FILE, LARGE_FUNCTION, MOST_LINES = 400, 60, 450


def imported(path):
    """Every module that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages_imported(path):
    parts = (name.split(".") for name in imported(path))
    return {p[1] for p in parts if p[0] == "jaxguard" and len(p) > 1 and (PACKAGE / p[1]).is_dir()}


def test_every_package_is_listed():
    assert {p.parent.name for p in PACKAGE.glob("*/__init__.py")} == set(BELOW)


@pytest.mark.parametrize("package", BELOW)
def test_imports_go_one_way(package):
    """But for a stage's command, which may begin a stage above it: `distill audit` is an evaluation."""
    for path in (PACKAGE / package).rglob("*.py"):
        if path.name == "__main__.py":
            continue
        assert packages_imported(path) <= packages_below(package), path


def test_data_runs_without_jax():
    """Preparing data must neither wait for an accelerator nor claim one; grain, which batches read with, loads JAX."""
    code = "import sys, jaxguard.data.prepare, jaxguard.data.sources; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    for path in (*(PACKAGE / "data").rglob("*.py"), *(PACKAGE / "distill").rglob("*.py")):
        assert not {name.split(".")[0] for name in imported(path)} & {"jax", "flax", "optax", "orbax"}, path


def warn(message):
    """Show a hint in pytest's summary without failing."""
    warnings.warn(SizeWarning(message), stacklevel=2)


@pytest.mark.filterwarnings("default::test_project.SizeWarning")
def test_sizes():
    for path in PYTHON_FILES:
        if path.is_relative_to(ROOT / "tests"):
            continue
        source = path.read_text(encoding="utf-8")
        lines = len(source.splitlines())
        assert lines <= MOST_LINES, f"{path}: {lines} lines"
        if lines > LARGE_FILE:
            warn(f"{path}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = (ast.get_docstring(node, clean=False) or "").splitlines()
                length = (node.end_lineno or 0) - node.lineno + 1 - len(docstring)
                if length > LARGE_FUNCTION:
                    warn(f"{path}: {node.name} has {length} lines")


def test_nothing_is_unfinished():
    words = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "X" * 3 + r"\b", "raise NotImplemented" + "Error"]))
    for path in PYTHON_FILES:
        assert not words.search(path.read_text(encoding="utf-8")), path


def test_documented_fields_are_the_configs():
    tables = written(document_config.DOCUMENT)
    assert tables == document_config.tables(), "run python tools/document_config.py"
    assert not re.findall(r"\|  \|$", tables, re.MULTILINE), "a field has no docstring"


# Words for which there is a standard term; see the glossary in CONTRIBUTING.md.
REPLACED = """
    door doors foreign floors sandwich norm_offset row_tokens judgement judgements thought thoughts Sampled
    initialise initialised initialisation rematerialise rematerialised rematerialisation
"""
REPLACED_WORD = re.compile(rf"(?<![A-Za-z])({'|'.join(REPLACED.split())})(?![A-Za-z])")
# Files that still use some, or mean something else.
UNCHANGED = """
    docs/guards.md
    jaxguard/distill/filters.py
    tools/demo_data.py
"""


def test_vocabulary():
    for path in (*PYTHON_FILES, *DOCUMENTS):
        name = str(path.relative_to(ROOT))
        if not name.startswith(("tests/", *UNCHANGED.split())):
            words = {match[0] for match in REPLACED_WORD.finditer(path.read_text(encoding="utf-8"))}
            assert not words, f"{name}: {sorted(words)}"


def shell_lines():
    """(file, line) of every command in the documents' sh blocks, and of every example in a stage's help."""
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            yield from ((document.relative_to(ROOT), line) for line in block.replace("\\\n", " ").splitlines())
    for file in sorted(PACKAGE.glob("*/__main__.py")):
        examples = r"^  (?:.*\| )?((?:python -m |jaxguard [a-z]+ (?!   )).*)$"
        for line in re.findall(examples, file.read_text(encoding="utf-8"), re.MULTILINE):
            yield file.relative_to(ROOT), line


def commands():
    """The same as words, as a shell would read them; what it would put in for $(…) is left out."""
    for document, line in shell_lines():
        words = shlex.split(re.sub(r"\$\([^)]*\)", "", line), comments=True)
        if words:
            yield document, words


def stage_calls():
    """(what is written, stage, its arguments) of every command that runs a stage."""
    launchers = {"launch/slurm/train.sbatch": ("train", 1), "launch/sglang/serve.sbatch": ("distill", 2)}
    for document, words in commands():
        text = f"{document}: {' '.join(words)}"
        if words[:2] == ["python", "-m"] and words[2].startswith("jaxguard."):
            yield text, words[2].removeprefix("jaxguard."), words[3:]
        for script, (stage, index) in launchers.items():
            arguments = words[words.index(script) + index :] if script in words else []
            if arguments and arguments[0] in stages():
                stage, *arguments = arguments
            if arguments:
                yield text, stage, ["--config", *arguments]
        if words[0] == "jaxguard" and words[1] != "--help":
            yield text, words[1], words[2:]


def test_documented_commands_are_quoted():
    """No unquoted bracket, brace or the like: a shell may expand them, or takes what follows a space for another word."""
    for document, line in shell_lines():
        bare = re.sub(r"""\$\([^)]*\)|'[^']*'|"[^"]*"|#.*""", "", line)
        assert not re.search(r"[][{}()*?<>;&|~]", bare), f"{document}: {line}"


def test_documented_commands_parse(capsys, monkeypatch):
    """Their own parsers take them, and what they change is a config, or a study's configs."""
    monkeypatch.chdir(ROOT)
    checked = set()
    for text, stage, words in stage_calls():
        command = importlib.import_module(f"jaxguard.{stage}.__main__").main
        if stage in ("check", "serve", "load", "init", "env", "push") or words[:1] == ["sweep"]:  # these begin at once
            command, words = (command.commands["sweep"], words[1:]) if words[:1] == ["sweep"] else (command, words)
            assert command.parser().parse_known_intermixed_args(words)[1] == [], text
        else:
            # A file of the reader's own stands for any that extends a shipped one.
            arguments = ["gemma4b_5k" if word.startswith(("my/", "my_guard/")) else word for word in words]
            # What is printed is a config; whether its files are there is another matter.
            main([stage, *arguments, "--dry-run"])
            printed = capsys.readouterr()
            assert printed.out, f"{text}\n{printed.err}"
        checked.add(stage)
    assert checked >= {"data", "distill", "train", "evaluate", "mine", "plan", "study", "check", "serve"}


def test_documented_commands_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    checked = 0
    for document, words in commands():
        text = f"{document}: {' '.join(words)}"
        checked += words[0] in ("make", "python", "jaxguard", "sbatch", "bash")
        if words[0] == "make":
            assert [w for w in words[1:] if "=" not in w and w not in targets] == [], text
        if "--config" in words:
            name = words[words.index("--config") + 1]
            assert name.isupper() or "/" in name or (ROOT / "configs" / f"{name}.yaml").is_file(), text
        for word in words:
            if word.startswith("jaxguard."):
                assert word.removeprefix("jaxguard.") in stages(), text
            if re.match(r"(tools|launch|configs|docs)/", word):
                assert (ROOT / word).exists(), text
        if words[0] == "jaxguard" and words[1] != "--help":
            assert words[1] in stages(), text
    assert checked >= 5


def test_links_in_documents():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document}: {target}"
