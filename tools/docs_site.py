"""mkdocs' hooks: pages from outside docs/, links that lead there, and an API page for each package."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES_OUTSIDE = ("launch/README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
PACKAGES = sorted(path.parent.name for path in ROOT.glob("jaxguard/*/__init__.py"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the API reference to the navigation."""
    assert config.nav is not None
    pages = [{"jaxguard": "api/index.md"}, *({f"jaxguard.{package}": f"api/{package}.md"} for package in PACKAGES)]
    config.nav.append({"API reference": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of docs/."""
    for name in PAGES_OUTSIDE:
        if (ROOT / name).exists():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    files.append(
        File.generated(config, "api/index.md", content="::: jaxguard\n    options: {show_submodules: false}\n")
    )
    for package in PACKAGES:
        files.append(File.generated(config, f"api/{package}.md", content=f"::: jaxguard.{package}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite the links between docs/ and the rest of the repository; one to a file that the site lacks becomes its name."""
    uri = page.file.src_uri
    source = ROOT / uri if uri in PAGES_OUTSIDE else DOCS / uri

    def rewrite(match: re.Match[str]) -> str:
        text, path, anchor = match.groups()
        target = Path(os.path.normpath(source.parent / path))
        if target.is_relative_to(DOCS):
            wanted = target.relative_to(DOCS).as_posix()
        else:
            wanted = target.relative_to(ROOT).as_posix()
            if wanted not in PAGES_OUTSIDE and target.exists():
                return f"`{wanted}`"
        return f"[{text}]({os.path.relpath(wanted, Path(uri).parent)}{anchor})"

    return re.sub(r"(?<!!)\[([^]]*)\]\(([^)#:\s]+)((?:#[^)]*)?)\)", rewrite, markdown)
