"""Report on a run's data: counts, label balance, lengths, packing, and one example with its loss mask in colour."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from jaxguard.config import Config
from jaxguard.data.encoding import EncodedExample, Encoder
from jaxguard.data.format.dialogue import CHOICES, LABEL
from jaxguard.data.packing import Schedule, total_steps
from jaxguard.data.prepare import Prepared, Selection
from jaxguard.data.questions import cautions, table_of, trained_together
from jaxguard.report import Table
from jaxguard.report.text import share, visible
from jaxguard.utils.errors import JaxguardError

PERCENTILES = (5, 50, 95, 99, 100)
SAMPLED_STEPS = 200
TRAINED = "black on green"
OPEN, CLOSE = "⟦", "⟧"


def report(
    config: Config, selection: Selection, prepared: Prepared, encoder: Encoder, show_text: bool = False
) -> Group:
    """Return the report for a rich console; `show_text` also shows the example's untrusted text."""
    manifest = prepared.manifest
    lengths = np.array([len(sequence.tokens) for sequence in prepared.train])
    trained = np.array([int(sequence.loss_mask.sum()) for sequence in prepared.train])
    percentiles = Table(
        ("tokens", *("longest" if p == 100 else f"{p}%" for p in PERCENTILES)), "Lengths of the training sequences"
    )
    for name, values in (("all", lengths), ("trained on", trained)):
        percentiles.add(name, *(int(np.percentile(values, p, method="nearest")) for p in PERCENTILES))
    tables = [*_tables(manifest), percentiles]
    packed = packing(config, prepared.train)
    summary = Text(
        f"\nPacking: {packed['steps']:,} steps of {config.train.batch_size} examples, "
        f"{packed['rows']:.1f} rows of {packed['tokens']:,.0f} tokens a batch, {packed['padding']:.1%} padding, "
        f"{packed['shared']:.1%} of the tokens shared and computed once, {packed['computed']:,.0f} computed an example, "
        f"{packed['shapes']:.0f} shape(s) in {min(SAMPLED_STEPS, int(packed['steps']))} sampled steps, "
        "before rounding up to the number of devices.\n"
    )
    shown = [table.rich() for table in tables if table.rows]
    warnings = [Text(visible(text), style="yellow") for text in cautions(prepared.trained_together, encoder.policy)]
    return Group(*shown, *warnings, _histogram(lengths), summary, _example(selection, prepared, encoder, show_text))


def packing(config: Config, sequences: Sequence[EncodedExample]) -> dict[str, float]:
    """Measure the packing of evenly spaced steps on one device; more devices may add rows, since each gets equally many.

    `rows` and `tokens`: of a batch, and of a row. `padding`: share of tokens that belong to no example, including rows added
    for a bucketed shape. `shared`: share of the examples' tokens that are computed once for several examples. `computed`: tokens
    an example.
    """
    train = config.train
    steps = total_steps(len(sequences), train.batch_size, train.epochs, train.max_steps)
    if steps == 0:
        raise JaxguardError(
            f"{len(sequences)} examples and train.epochs={train.epochs:g} make no whole batch of "
            f"train.batch_size={train.batch_size}; raise epochs or lower batch_size"
        )
    schedule = Schedule.of(config, sequences, steps, train.accumulation)
    sampled = np.unique(np.linspace(0, steps - 1, min(steps, SAMPLED_STEPS)).astype(int)).tolist()
    shapes = [schedule.shape(step) for step in sampled]
    answers = (each for step in sampled for i in schedule.examples(step) for each in sequences[i].sequences)
    unshared = sum(len(each.tokens) for each in answers)
    used = sum(row.tokens for step in sampled for row in schedule.rows(step))
    total = sum(shape.rows * shape.tokens for shape in shapes)
    return {
        "steps": steps,
        "rows": float(np.mean([shape.rows for shape in shapes])),
        "tokens": float(np.mean([shape.tokens for shape in shapes])),
        "padding": 1 - used / total,
        "shared": 1 - used / unshared,
        "computed": used / (len(sampled) * train.batch_size),
        "shapes": len(set(shapes)),
    }


def _tables(manifest: dict[str, Any]) -> tuple[Table, ...]:
    """Tabulate a manifest: its sources, its sets, their labels, and what was dropped."""
    sources = Table(("", "source", "examples", "skipped", "why"), "Sources", left=2)
    for source in manifest["sources"]:
        name = source.get("hub") or ", ".join(source["files"])
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in source["skipped"].items())
        skipped = sum(source["skipped"].values())
        sources.add(source["role"], f"{source['kind']}: {name}", source["examples"], skipped, reasons)
    roles = [role for role in ("train", "validation") if manifest[role]["sequences"]]
    sets = [manifest[role] for role in roles]
    table = Table(("", *roles), "After selection and encoding")
    table.add("examples", *(s["examples"] for s in sets))
    for mode in ("reasoning", "direct"):
        if any(mode in s["by_mode"] for s in sets):
            table.add(f"in {mode} mode", *(s["by_mode"].get(mode, 0) for s in sets))
    table.add("with a response", *(s["with_response"] for s in sets))
    table.add("truncated", *(s["cut"] for s in sets))
    table.add("tokens", *(s["tokens"] for s in sets))
    table.add("trained on", *(f"{s['trained_tokens']:,} ({share(s['trained_tokens'], s['tokens'])})" for s in sets))
    for name in list(sets[0]["by_source"])[:20]:
        table.add(f"from {name}", *(s["by_source"].get(name, 0) for s in sets))
    labels = Table(("", "label", "positive", "negative", "not labelled"), "Label balance", left=2)
    for role in roles:
        for question, (positive, negative) in CHOICES.items():
            values = manifest[role]["labels"][LABEL[question]]
            yes, no = values.get(positive, 0), values.get(negative, 0)
            balance = f" ({yes / (yes + no):.0%})" if yes + no else ""
            counts = (f"{yes:,} {positive}{balance}", f"{no:,} {negative}", values.get("None", 0))
            labels.add(role, LABEL[question].removesuffix("_label"), *counts)
    asked = table_of(trained_together(manifest))
    return sources, table, labels, asked, Table.of(("dropped", "examples"), manifest["dropped"].items())


def _histogram(lengths: np.ndarray) -> RichTable:
    """Plot lengths in 12 bins of equal width, in bars of up to 40 characters."""
    counts, edges = np.histogram(lengths, min(12, int(np.ptp(lengths)) + 1))
    table = RichTable.grid(padding=(0, 1))
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(40 * count / counts.max()) or ("▏" if count else "")
        table.add_row(Text(f"{low:,.0f}-{high:,.0f}", justify="right"), Text(bar, style="cyan"), f"{count:,}")
    return table


def _example(selection: Selection, prepared: Prepared, encoder: Encoder, show_text: bool) -> Panel:
    """Show the training example of median length; in dual mode, one with reasoning."""
    reasoning = [s for s in prepared.train if s.mode == "reasoning"] or prepared.train
    median = np.percentile([len(s.tokens) for s in reasoning], 50, method="nearest")
    sequence = next(s for s in reasoning if len(s.tokens) == median)
    example, mode = next((e, mode) for e, mode in selection.train if e.id == sequence.example_id)
    if not show_text:
        placeholders: dict[str, Any] = {}
        for name in ("prompt", "response", "trace"):
            text = getattr(example, name)
            if text is not None:
                words = len(re.findall(r"\w+", text))
                placeholders[name] = f"({name}: {len(text):,} characters, {words:,} words, hidden)"
        example = replace(example, **placeholders)
    shown = encoder.encode(example, mode)
    if shown is None:
        raise JaxguardError(f"example {example.id!r}: the trace does not fit into data.max_seq_len")
    note = "" if show_text else "; its texts are hidden, --show-text shows them"
    legend = Text.assemble(
        "trained on: ", (f"{OPEN}highlighted{CLOSE}", TRAINED), f"; {mode} mode, {len(shown.tokens):,} tokens{note}"
    )
    body = render_mask(shown, encoder.tokenizer)
    title = Text(f"Example {visible(example.id)} from {visible(example.source)}")
    return Panel(Group(body, Text(), legend), title=title, title_align="left")


def render_mask(sequence: EncodedExample, tokenizer: Any) -> Text:
    """Decode a sequence, control characters replaced, with the trained tokens highlighted and in ⟦ ⟧."""
    text = Text()
    edges = np.flatnonzero(np.diff(sequence.loss_mask.astype(np.int8))) + 1
    for run in np.split(np.arange(len(sequence.tokens)), edges):
        ids = sequence.tokens[run].tolist()
        piece = visible(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if sequence.loss_mask[run[0]]:
            text.append(f"{OPEN}{piece}{CLOSE}", style=TRAINED)
        else:
            text.append(piece)
    return text
