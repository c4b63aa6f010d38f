"""`make bench-checkpoints`: time import and export of a Llama-3.2-1B-shaped checkpoint (2.5 GB, bfloat16, four files).

They are compared with raw disk speed and transformers. Every measurement is its own process with a cold page cache: the files'
pages are dropped before it. "raw read" reads the files from first byte to last into one buffer; "raw write" writes and syncs as
many bytes. An import fills twice the files' bytes of newly allocated memory; "first touch" is the time that the system needs to
provide as much to one thread.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

from jaxguard.models.hf_io.checkpoints import export_hf, read_weights
from jaxguard.models.hf_io.safetensors import INDEX, shard_files
from jaxguard.models.spec import Spec, read_spec
from jaxguard.models.weights import Weight, abstract, table
from timed import sync, timed

SHAPE = Path("configs/shapes/meta-llama--Llama-3.2-1B-Instruct")
FOLDER = Path("build/bench/checkpoint")
FILES = 4
BLOCK = 16 * 2**20


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=list(MEASURED), help="measure this here and print JSON")
    chosen = parser.parse_args(arguments)
    if chosen.measure:
        print(json.dumps(MEASURED[chosen.measure]()))
        return 0
    make(FOLDER)
    commands = {name: [sys.executable, __file__, "--measure", name] for name in MEASURED} | PEERS
    results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(chosen.rounds):
        for name, command in commands.items():
            _forget()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 (our own)
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    Console().print(_table(results))
    return 0


def make(folder: Path) -> None:
    """Write random weights in several files, unless they exist."""
    if (folder / INDEX).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(SHAPE / "config.json", folder / "config.json")
    shapes = dict(_tensors(read_spec(folder)))
    names, random = list(shapes), np.random.default_rng(0)
    index: dict[str, str] = {}
    for i in range(FILES):
        file = f"model-{i + 1:05d}-of-{FILES:05d}.safetensors"
        part = {
            name: (random.standard_normal(shapes[name], dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)
            for name in names[i::FILES]
        }
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")


def _tensors(spec: Spec) -> list[tuple[str, tuple[int, ...]]]:
    def tensors(weight: Weight) -> list[tuple[str, tuple[int, ...]]]:
        layers = range(spec.num_layers if weight.stacked else 1)
        return [("model." + weight.hf.format(i=i), weight.hf_shape(spec)) for i in layers]

    return [pair for weight in table(spec) for pair in tensors(weight)]


def _forget() -> None:
    """Drop the files' pages from the page cache."""
    os.sync()
    for path in FOLDER.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _raw_read() -> dict[str, float]:
    def work() -> None:
        buffer = bytearray(BLOCK)
        for path in shard_files(FOLDER):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return timed(work)


def _raw_write() -> dict[str, float]:
    block = os.urandom(BLOCK)

    def work() -> None:
        with (FOLDER / "raw").open("wb", buffering=0) as file:
            for _ in range(sum(path.stat().st_size for path in shard_files(FOLDER)) // BLOCK):
                file.write(block)
            os.fsync(file.fileno())

    measured = timed(work)
    (FOLDER / "raw").unlink()
    return measured


def _first_touch() -> dict[str, float]:
    shapes = abstract(read_spec(FOLDER)).values()
    return timed(lambda: [np.ones(weight.shape, np.float32) for weight in shapes])


def _safetensors() -> dict[str, float]:
    """As stored, not cast."""
    return timed(lambda: [load_file(path) for path in shard_files(FOLDER)])


def _import() -> dict[str, float]:
    import jax

    spec = read_spec(FOLDER)
    return timed(lambda: jax.block_until_ready(read_weights(FOLDER, spec)))


def _export() -> dict[str, float]:
    """Export weights that all differ from the source's."""
    import jax

    weights = {path: jax.block_until_ready(-value) for path, value in read_weights(FOLDER, read_spec(FOLDER)).items()}
    gc.collect()  # JAX frees the source's memory now, or at some later call
    output = FOLDER / "export"
    shutil.rmtree(output, ignore_errors=True)

    def work() -> None:
        export_hf(weights, FOLDER, output)
        sync(output)

    measured = timed(work)
    shutil.rmtree(output)
    return measured


MEASURED = {
    "raw read": _raw_read,
    "first touch": _first_touch,
    "safetensors, load_file": _safetensors,
    "import": _import,
    "raw write": _raw_write,
    "export": _export,
}

_TRANSFORMERS = [".venv-bench-trl/bin/python", "tools/bench/peers/with_transformers_files.py"]
PEERS = {
    "transformers, load": [*_TRANSFORMERS, "load", str(FOLDER)],
    "transformers, save": [*_TRANSFORMERS, "save", str(FOLDER)],
}

BESIDE = {
    "import": "raw read",
    "safetensors, load_file": "raw read",
    "transformers, load": "raw read",
    "export": "raw write",
    "transformers, save": "raw write",
}
"""Measurement -> the raw speed that it is compared with."""


def _table(results: dict[str, list[dict[str, float]]]) -> Table:
    result = Table("what", title=f"{SHAPE.name}, bfloat16 in {FILES} files", title_justify="left")
    for heading in ("seconds", "of raw speed", "memory grown, GiB"):
        result.add_column(heading, justify="right")
    for name, runs in results.items():
        seconds, memory = (median(run[key] for run in runs) for key in ("seconds", "gib"))
        beside = results[BESIDE[name]] if name in BESIDE else []
        ratios = sorted(b["seconds"] / a["seconds"] for a, b in zip(runs, beside, strict=False))
        share = f"{median(ratios):.0%} [{ratios[0]:.0%}, {ratios[-1]:.0%}]" if ratios else ""
        result.add_row(name, f"{seconds:.2f}", share, f"{memory:.2f}")
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
