"""The card of a built data set: README.md with YAML that `datasets` and the hub read."""

from typing import Any

from jaxguard.report import Cell, Code, Content, Page, Paragraph, Section, Table, page_markdown


def card(manifest: dict[str, Any]) -> str:
    """Return README.md of a built data set."""
    subsets = [
        (name, part, subset) for name, entry in manifest["sets"].items() for part, subset in entry["subsets"].items()
    ]
    configs = [
        {"config_name": f"{name}_{part}{suffix}", "data_files": path}
        for name, part, subset in subsets
        for suffix, path in zip(("", "_chat"), subset["files"], strict=True)
    ]
    front = {
        "task_categories": ["text-classification", "text-generation"],
        "tags": ["safety", "guardrails", "reasoning", "jaxguard"],
        "configs": [{"default": True, **configs[0]}, *configs[1:]],
    }
    first = next(iter(manifest["sets"]))
    example = (
        f'datasets.load_dataset("path/to/this/folder", "{first}_all")       # our columns\n'
        f'datasets.load_dataset("path/to/this/folder", "{first}_all_chat")  # chat messages'
    )
    chat: list[str | Cell] = [
        "SIZE_SEED are random subsets; for each seed, smaller ones are contained in larger ones. Appended examples are added to "
        "each subset. The column mode says whether an example is trained with its trace. Chat messages are rendered as in "
        "training for ", Cell(manifest["checkpoint"], code=True), " under the policy ",
        Cell(manifest["data"]["policy"], code=True), ".",
    ]  # fmt: skip
    blocks: list[Content] = [
        Paragraph(["Built by jaxguard ", manifest["jaxguard"], ", version ", Cell(manifest["version"], code=True), ". It holds "
                   "offensive text by nature: conversations that people labelled as harmful or not, and a teacher's reasoning "
                   "about them. The licences of its sources apply."]),
        Code(example, "python"),
        _sets(manifest),
        Paragraph(chat),
        Section("Sources", [
            _sources(manifest),
            "manifest.json has the hash of every file, what was dropped and why, and the config. contaminated.jsonl lists the "
            "examples that were dropped because a benchmark holds their prompt.",
        ]),
    ]  # fmt: skip
    return page_markdown(Page("Training sets for a safety guard", blocks, front))


def _sets(manifest: dict[str, Any]) -> Table:
    columns = ("set", "examples", "with a trace", "appended", "harmful prompts", "harmful responses", "contaminated")
    table = Table(columns)
    for name, entry in manifest["sets"].items():
        for part, subset in entry["subsets"].items():
            harmful = [subset["labels"][label].get("harmful", 0) for label in ("prompt_label", "response_label")]
            counts = (subset["examples"], subset["by_mode"].get("reasoning", 0), subset["appended"], *harmful)
            table.add(f"{name}_{part}", *counts, entry["contaminated"])
    return table


def _sources(manifest: dict[str, Any]) -> Table:
    table = Table(("set", "source", "examples", "skipped", "teacher's attempts"), left=2)
    for name, entry in manifest["sets"].items():
        for origin in entry["sources"]:
            path = origin.get("hub") or ", ".join(origin["files"])
            role = f"{origin['kind']}, appended" if origin["role"] == "append" else origin["kind"]
            attempts = origin.get("distilled", {}).get("attempts", "")
            table.add(name, Cell(path, role, code=True), origin["examples"], sum(origin["skipped"].values()), attempts)
    return table
