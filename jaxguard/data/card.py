"""The card of a built data set: YAML that `datasets` and the hub read, and a page for people."""

from typing import Any

import yaml

from jaxguard.report.markdown import code, table


def card(manifest: dict[str, Any]) -> str:
    """README.md of a built data set, from its manifest."""
    configs = [
        {"config_name": f"{name}_{part}{suffix}", "data_files": path}
        for name, one in manifest["sets"].items()
        for part, subset in one["subsets"].items()
        for suffix, path in zip(("", "_chat"), subset["files"], strict=True)
    ]
    head = {
        "task_categories": ["text-classification", "text-generation"],
        "tags": ["safety", "guardrails", "reasoning", "jaxguard"],
        "configs": [{"default": True, **configs[0]}, *configs[1:]],
    }
    first = next(iter(manifest["sets"]))
    return "\n\n".join(
        [
            f"---\n{yaml.safe_dump(head, sort_keys=False).rstrip()}\n---",
            "# Training sets for a safety guard",
            f"Built by jaxguard {manifest['jaxguard']}, version `{manifest['version']}`. It holds offensive text by nature: "
            "conversations that people labelled as harmful or not, and a teacher's reasoning about them. The licences of "
            "its sources apply.",
            f'```python\ndatasets.load_dataset("path/to/this/folder", "{first}_all")       # our columns\n'
            f'datasets.load_dataset("path/to/this/folder", "{first}_all_chat")  # chat messages\n```',
            _sets(manifest),
            "`SIZE_SEED` are random subsets; of one seed, smaller ones are contained in larger ones. Appended examples are in "
            "each of them besides. `mode` says whether an example is trained with its trace. Chat messages are what "
            f"training shows {code(manifest['checkpoint'])}, policy {code(manifest['data']['policy'])} included.",
            "## Sources",
            _sources(manifest),
            "`manifest.json` has the hash of every file, what was dropped and why, and the config that this was built with. "
            "`contaminated.jsonl` lists the examples that were dropped because a benchmark holds their prompt.",
        ]
    ) + "\n"  # fmt: skip


def _sets(manifest: dict[str, Any]) -> str:
    heads = ("set", "examples", "with a trace", "appended", "harmful prompts", "harmful responses", "contaminated")
    rows: list[tuple[str, ...]] = [heads]
    for name, one in manifest["sets"].items():
        for part, subset in one["subsets"].items():
            labels = subset["labels"]
            harmful = (labels[x].get("harmful", 0) for x in ("prompt_label", "response_label"))
            counts = (subset["examples"], subset["by_mode"].get("reasoning", 0), subset["appended"], *harmful)
            rows.append((f"{name}_{part}", *(f"{count:,}" for count in (*counts, one["contaminated"]))))
    return table(rows[0], rows[1:])


def _sources(manifest: dict[str, Any]) -> str:
    rows = [("set", "source", "examples", "skipped", "teacher's attempts")]
    for name, one in manifest["sets"].items():
        for origin in one["sources"]:
            where = f"{origin['kind']}: {code(origin.get('hub') or ', '.join(origin['files']))}"
            if origin["role"] == "append":
                where += ", appended"
            attempts = origin.get("distilled", {}).get("attempts")
            told = "" if attempts is None else f"{attempts:,}"
            rows.append((name, where, f"{origin['examples']:,}", f"{sum(origin['skipped'].values()):,}", told))
    return table(rows[0], rows[1:])
