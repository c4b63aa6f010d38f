"""How far our logits are from transformers': `compare_logits.py --checkpoint HF --config NAME`. Needs torch.

The config's validation examples, each alone, at all positions: ours and transformers' in float32, and transformers' in
float64, which tells who of both errs. Printed for each pair: the largest difference of an example in the middle (the median)
and at worst, how many examples have none above 1e-4, and how many logits of all differ by more.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxguard.config import load
from jaxguard.data.prepare import prepare
from jaxguard.models.compute import Compute
from jaxguard.models.decoder import Decoder
from jaxguard.models.hf_io.checkpoints import read_weights
from jaxguard.models.spec import read_spec
from jaxguard.utils.errors import JaxguardError

PAIRS = (("ours", "float32"), ("ours", "float64"), ("float32", "float64"))
BOUND = 1e-4
MULTIPLE = 256
"""Sequences are padded to multiples of it, so that few programs are compiled."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a Hugging Face folder, such as an export")
    parser.add_argument("--config", required=True, help="whose validation examples, policy and mode are taken")
    parser.add_argument("--limit", type=int, help="as many examples at most")
    args = parser.parse_args()
    console = Console(highlight=False)
    try:
        held = prepare(load(args.config), args.checkpoint).validation[: args.limit]
        sequences = [branches[0].tokens for _, _, branches in held]
        found = list(track(differences(args.checkpoint, sequences), "comparing", len(sequences), console=console))
        logits = sum(map(len, sequences)) * read_spec(args.checkpoint).vocab_size
    except JaxguardError as error:
        parser.exit(2, f"error: {error}\n")
    console.print(table(found, logits))


def differences(folder: Path, sequences: Sequence[np.ndarray]) -> Iterator[list[tuple[float, int]]]:
    """Of each sequence, for each of PAIRS: the largest absolute difference of two logits, and how many are above BOUND."""
    spec = read_spec(folder)
    decoder = Decoder(spec, read_weights(folder, spec), Compute())
    ours = jax.jit(lambda tokens_BT: decoder.logits(decoder(tokens_BT)))
    theirs = {name: _transformers(folder, name) for name in ("float32", "float64")}
    for tokens in sequences:
        padded = np.pad(tokens, (0, -len(tokens) % MULTIPLE))[None]
        logits = {name: model(tokens) for name, model in theirs.items()}
        logits["ours"] = np.asarray(ours(jnp.asarray(padded)))[0, : len(tokens)]
        apart = [np.abs(logits[a] - logits[b]) for a, b in PAIRS]
        yield [(float(x.max()), int((x > BOUND).sum())) for x in apart]


def _transformers(folder: Path, dtype: str) -> Any:
    """Tokens int[n] -> logits float[n, V]."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise JaxguardError("transformers computes with torch, which is not installed: pip install torch") from None
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=getattr(torch, dtype)).eval()

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.tensor(tokens)[None]).logits[0].numpy()

    return logits


def table(found: Sequence[Sequence[tuple[float, int]]], logits: int) -> Table:
    """Of what `differences` gives, and the number of all logits."""
    result = Table("logits", title="Largest difference of an example's logits", title_justify="left")
    beyond = f"logits beyond, of {logits / 1e6:,.0f} million"
    for heading in ("median", "worst", f"examples within {BOUND:.0e}", beyond):
        result.add_column(heading, justify="right")
    for (a, b), values in zip(PAIRS, zip(*found, strict=True), strict=True):
        largest, above = np.array(values).T
        within = f"{(largest <= BOUND).sum()} of {len(values)}"
        row = f"{np.median(largest):.2e}", f"{largest.max():.2e}", within, f"{above.sum():,.0f}"
        result.add_row(f"{_named(a)}, {_named(b)}", *row)
    return result


def _named(name: str) -> str:
    return name if name == "ours" else f"transformers in {name}"


if __name__ == "__main__":
    main()
