"""What is installed: versions with hashes, and a package that has its configs with it."""

import ast
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from jaxguard.utils.versions import install

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "constraints").glob("*.txt"))}
LOCKED = {name: text for name, text in CONSTRAINTS.items() if name != "lowest"}
LOCKED_EXTRAS = ("distill", "gguf", "serve", "test", "lint", "docs", "aot", "gpu", "tpu")


def pins(text):
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


def requirements():
    project = PROJECT["project"]
    extras = [line for extra in LOCKED_EXTRAS for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in (*project["dependencies"], *extras, *PROJECT["build-system"]["requires"])]


def test_what_is_locked_satisfies_the_ranges():
    locked = {name: version for text in LOCKED.values() for name, version in pins(text).items()}
    for requirement in requirements():
        if requirement.name != PROJECT["project"]["name"]:
            version = locked.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement}: run make lock"
            assert requirement.specifier.contains(version), f"{requirement}, but {version} is locked: run make lock"


def test_the_lowest_releases_that_are_allowed_are_tested():
    """Each lower bound is one of the versions of `make test-lowest`, and CI runs that."""
    lowest, extras = pins(CONSTRAINTS["lowest"]), PROJECT["project"]["optional-dependencies"]
    for line in (
        *PROJECT["project"]["dependencies"],
        *extras["distill"],
        *extras["gguf"],
        *extras["serve"],
        *extras["test"],
    ):
        requirement = Requirement(line)
        if requirement.name == PROJECT["project"]["name"]:
            continue
        bounds = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
        assert bounds == [Version(lowest[canonicalize_name(requirement.name)])], f"{line}: run make lock"
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert {"test-lowest", "test-latest"} <= set(re.findall(r"target: ([\w-]+)", workflow))


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_what_is_locked_has_hashes_and_no_addresses(name):
    lines = CONSTRAINTS[name].splitlines()
    for line, following in pairwise(lines):
        assert re.match(r"[a-z0-9-]+==\S+|    --hash=sha256:[0-9a-f]{64}", line), line
        if "==" in line:
            assert following.startswith("    --hash="), line
    assert "://" not in CONSTRAINTS[name]
    assert "torch" not in pins(CONSTRAINTS[name])


def test_each_package_is_locked_at_one_version():
    pinned = {pin for text in LOCKED.values() for pin in pins(text).items()}
    assert len(pinned) == len({name for name, _ in pinned})


def test_what_is_imported_is_installed():
    """Of the base installation; what an extra holds is imported where it is needed, with a hint."""
    distributions = importlib.metadata.packages_distributions()
    groups = {"": PROJECT["project"]["dependencies"], **PROJECT["project"]["optional-dependencies"]}
    names = {extra: {canonicalize_name(Requirement(text).name) for text in lines} for extra, lines in groups.items()}
    optional = names["distill"] | names["trackio"] | names["wandb"]
    base = names[""] | {"rich", "packaging", "jaxguard", "pyarrow", "tokenizers", "markupsafe"}  # those of dependencies
    served = names["serve"] | {"starlette"}  # FastAPI's; __main__.py names the extra where it lacks
    for path in (ROOT / "jaxguard").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names:
                owners = {canonicalize_name(name) for name in distributions.get(module, [module])}
                allowed = base if node in tree.body else base | optional
                allowed = allowed | served if path.parent.name in ("load", "serve") else allowed
                assert owners & allowed, f"{path}: {module}"


@pytest.mark.parametrize("extra", ["aot", "distill", "gguf", "serve", "trackio", "wandb"])
def test_hints_name_what_an_extra_holds(extra):
    words = shlex.split(install(extra))
    assert words[:4] == ["python", "-m", "pip", "install"]
    wanted = {Requirement(text).name for text in PROJECT["project"]["optional-dependencies"][extra]}
    assert {Requirement(word).name for word in words[4:]} == wanted


def test_readme_installs_what_its_commands_need():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command, extra in {"plan ": "aot", "distill ": "distill", "data build": "distill", "serve ": "serve"}.items():
        assert re.search(rf"^python -m jaxguard\.{command}", readme, re.MULTILINE)
        assert f"pip install -e '.[{extra}]'" in readme, command


def test_the_build_group_is_what_the_build_needs():
    assert PROJECT["dependency-groups"]["build"] == PROJECT["build-system"]["requires"]


def test_a_wheel_holds_configs_templates_and_types(tmp_path):
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [p for folder in ("jaxguard", "configs") for p in (ROOT / folder).rglob("*")]:
        if path.suffix in {".py", ".j2", ".yaml", ".typed"}:
            name = path.relative_to(ROOT).as_posix()
            assert (f"jaxguard/{name}" if name.startswith("configs/") else name) in names
    assert {name.split("/")[0] for name in names} == {"jaxguard", wheel.name.split("-py3")[0] + ".dist-info"}
