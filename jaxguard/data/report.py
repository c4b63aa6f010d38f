"""What a run's data looks like: counts, balance, lengths, packing, and one example with its loss mask in colour."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jaxguard.config import Config
from jaxguard.data import encoding as encode
from jaxguard.data.packing import Schedule, packed_tokens, total_steps
from jaxguard.data.prepare import ExampleAndMode, Prepared, Selection
from jaxguard.utils.errors import JaxguardError

PERCENTILES = (5, 50, 95, 99, 100)
BARS = 12
BAR_WIDTH = 40
SAMPLED_STEPS = 200
TRAINED = "black on green"
OPEN, CLOSE = "⟦", "⟧"

LABEL_NAMES = {"prompt_label": "prompt", "response_label": "response", "refusal_label": "refusal"}
LABEL_VALUES = (("harmful", "unharmful"), ("harmful", "unharmful"), ("refusal", "compliance"))


def report(
    config: Config, selection: Selection, prepared: Prepared, encoder: encode.Encoder, show_text: bool = False
) -> Group:
    """The whole report, ready for a rich console; `show_text` also shows the example's untrusted text."""
    manifest = prepared.manifest
    parts: list[RenderableType] = [_sources(manifest), _sets(manifest), _labels(manifest)]
    if manifest["dropped"]:
        parts.append(_dropped(manifest))
    parts += [_lengths(prepared), _histogram(prepared), _packing(config, prepared)]
    parts.append(_example(_typical(selection, prepared), encoder, show_text))
    return Group(*parts)


def packing(config: Config, sequences: Sequence[encode.EncodedExample]) -> dict[str, float]:
    """How evenly spaced updates of the run are packed, on one device; more devices may add rows, since each gets as many.

    `rows` and `tokens`: of a batch, and of a row. `padding`: share of them that belongs to no example, rows added to reach
    a bucketed shape included. `shared`: share of the examples' tokens that are not computed, since another example of the
    row begins with them.
    """
    steps = total_steps(len(sequences), config.train.batch_size, config.train.epochs, config.train.max_steps)
    if steps == 0:
        raise JaxguardError(
            f"{len(sequences)} examples and train.epochs={config.train.epochs:g} make no whole batch of "
            f"train.batch_size={config.train.batch_size}; raise epochs or lower batch_size"
        )
    schedule = Schedule(
        sequences, config.train.batch_size, steps, config.data.max_seq_len, config.train.accumulation, config.seed
    )
    sampled = np.unique(np.linspace(0, steps - 1, min(steps, SAMPLED_STEPS)).astype(int)).tolist()
    shapes = [schedule.shape(step) for step in sampled]
    whole = sum(len(sequences[i].tokens) for step in sampled for i in schedule.examples(step))
    used = sum(packed_tokens(row) for step in sampled for row in schedule.rows(step))
    total = sum(shape.rows * shape.tokens for shape in shapes)
    return {
        "steps": steps,
        "rows": float(np.mean([shape.rows for shape in shapes])),
        "tokens": float(np.mean([shape.tokens for shape in shapes])),
        "padding": 1 - used / total,
        "shared": 1 - used / whole,
        "shapes": len(set(shapes)),
    }


def _sources(manifest: dict[str, Any]) -> Table:
    table = Table("", "source", "examples", "skipped", title="Sources", title_justify="left")
    for source in manifest["sources"]:
        name = source.get("hub") or "\n".join(source["files"])
        skipped = "\n".join(f"{count:,} {reason}" for reason, count in source["skipped"].items()) or "-"
        table.add_row(source["role"], Text(f"{source['kind']}: {name}"), f"{source['examples']:,}", Text(skipped))
    return table


def _sets(manifest: dict[str, Any]) -> Table:
    table = Table("", title="After selection and encoding", title_justify="left")
    roles = [role for role in ("train", "validation") if manifest[role]["sequences"]]
    for role in roles:
        table.add_column(role, justify="right")

    def row(name: str, values: Iterable[str]) -> None:
        table.add_row(Text(name), *values)

    sets = [manifest[role] for role in roles]
    row("examples", (f"{s['examples']:,}" for s in sets))
    for mode in ("reasoning", "direct"):
        if any(mode in s["by_mode"] for s in sets):
            row(f"  in {mode} mode", (f"{s['by_mode'].get(mode, 0):,}" for s in sets))
    row("with a response", (f"{s['with_response']:,}" for s in sets))
    row("cut to fit a row", (f"{s['cut']:,}" for s in sets))
    row("tokens", (f"{s['tokens']:,}" for s in sets))
    row("  trained on", (f"{s['trained_tokens']:,} ({s['trained_tokens'] / s['tokens']:.1%})" for s in sets))
    # Source names come from the data, so they are text and not markup.
    for source in list(sets[0]["by_source"])[:20]:
        row(f"from {printable(source)}", (f"{s['by_source'].get(source, 0):,}" for s in sets))
    return table


def _labels(manifest: dict[str, Any]) -> Table:
    table = Table("", "label", "positive", "negative", "not labelled", title="Label balance", title_justify="left")
    for role in ("train", "validation"):
        counts = manifest[role]
        if not counts["sequences"]:
            continue
        for (label, name), (positive, negative) in zip(LABEL_NAMES.items(), LABEL_VALUES, strict=True):
            values = counts["labels"][label]
            yes, no, unknown = values.get(positive, 0), values.get(negative, 0), values.get("None", 0)
            share = f" ({yes / (yes + no):.0%})" if yes + no else ""
            table.add_row(role, name, f"{yes:,} {positive}{share}", f"{no:,} {negative}", f"{unknown:,}")
    return table


def _dropped(manifest: dict[str, Any]) -> Table:
    table = Table("dropped", "examples", title_justify="left")
    for reason, count in manifest["dropped"].items():
        table.add_row(reason, f"{count:,}")
    return table


def _lengths(prepared: Prepared) -> Table:
    table = Table("tokens", title="Lengths of the training sequences", title_justify="left")
    for p in PERCENTILES:
        table.add_column("longest" if p == 100 else f"{p}%", justify="right")
    for name, values in (("whole", _totals(prepared)), ("trained on", _targets(prepared))):
        table.add_row(name, *(f"{np.percentile(values, p, method='nearest'):,.0f}" for p in PERCENTILES))
    return table


def _histogram(prepared: Prepared) -> Table:
    """Lengths in about a dozen bins of a round width."""
    totals = _totals(prepared)
    width = _round_up(max(1, (int(totals.max()) - int(totals.min())) // BARS + 1))
    first = int(totals.min()) // width
    counts = np.bincount(totals // width - first)
    table = Table.grid(padding=(0, 1))
    for i, count in enumerate(counts):
        low = (first + i) * width
        bar = "█" * round(BAR_WIDTH * count / counts.max()) or ("▏" if count else "")
        table.add_row(Text(f"{low:,}-{low + width - 1:,}", justify="right"), Text(bar, style="cyan"), f"{count:,}")
    return table


def _round_up(width: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, … that is at least width."""
    size = 1
    while True:
        for step in (1, 2, 5):
            if step * size >= width:
                return step * size
        size *= 10


def _packing(config: Config, prepared: Prepared) -> Text:
    packed = packing(config, prepared.train)
    return Text(
        f"\nPacking: {packed['steps']:,} updates of {config.train.batch_size} examples, "
        f"{packed['rows']:.1f} rows of {packed['tokens']:,.0f} tokens a batch, {packed['padding']:.1%} padding, "
        f"{packed['shared']:.1%} of the tokens shared and computed once, "
        f"{packed['shapes']:.0f} shape(s) in {min(SAMPLED_STEPS, int(packed['steps']))} sampled updates, "
        "before rounding up to the number of devices.\n"
    )


def _typical(selection: Selection, prepared: Prepared) -> ExampleAndMode:
    """The training example whose sequence is as long as the median; with both modes, one that reasons."""
    examples = {example.id: example for example, _ in selection.train}
    reasoning = [s for s in prepared.train if s.mode == "reasoning"] or prepared.train
    median = np.percentile([len(s.tokens) for s in reasoning], 50, method="nearest")
    sequence = next(s for s in reasoning if len(s.tokens) == median)
    return examples[sequence.example_id], sequence.mode


def _example(chosen: ExampleAndMode, encoder: encode.Encoder, show_text: bool) -> Panel:
    example, mode = chosen
    if not show_text:
        example = replace(
            example,
            prompt=_placeholder("prompt", example.prompt),
            response=None if example.response is None else _placeholder("response", example.response),
            trace=None if example.trace is None else _placeholder("trace", example.trace),
        )
    sequence = encoder.encode(example, mode)
    if sequence is None:
        raise JaxguardError(f"example {example.id!r}: the trace does not fit into a row")
    hidden = "" if show_text else "; its texts are hidden, --show-text shows them"
    legend = Text.assemble(
        "trained on: ",
        (f"{OPEN}highlighted{CLOSE}", TRAINED),
        f"; {mode} mode, {len(sequence.tokens):,} tokens{hidden}",
    )
    body = render_mask(sequence, encoder.tokenizer)
    title = Text(f"Example {printable(example.id)} from {printable(example.source)}")
    return Panel(Group(body, Text(), legend), title=title, title_align="left")


def render_mask(sequence: encode.EncodedExample, tokenizer: Any) -> Text:
    """The sequence's text, control characters made visible, with the trained tokens highlighted and in ⟦ ⟧."""
    text = Text()
    edges = np.flatnonzero(np.diff(sequence.loss_mask.astype(np.int8))) + 1
    for run in np.split(np.arange(len(sequence.tokens)), edges):
        piece = printable(tokenizer.decode(sequence.tokens[run].tolist(), skip_special_tokens=False))
        if sequence.loss_mask[run[0]]:
            text.append(f"{OPEN}{piece}{CLOSE}", style=TRAINED)
        else:
            text.append(piece)
    return text


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control and format characters other than line breaks become �."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cf"} else "\ufffd" for c in text)


def _placeholder(what: str, text: str) -> str:
    words = len(re.findall(r"\w+", text))
    return f"({what}: {len(text):,} characters, {words:,} words, hidden)"


def _totals(prepared: Prepared) -> np.ndarray:
    return np.array([len(sequence.tokens) for sequence in prepared.train])


def _targets(prepared: Prepared) -> np.ndarray:
    return np.array([int(sequence.loss_mask.sum()) for sequence in prepared.train])
