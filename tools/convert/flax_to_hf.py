"""An Orbax checkpoint -> a Hugging Face folder: `flax_to_hf.py --checkpoint DIR --source HF --output DIR`.

The output is shaped exactly like the source, the checkpoint that training started from.
"""

import argparse
from pathlib import Path

import jax

from jaxguard.models.hf_io.checkpoints import export_hf
from jaxguard.train.checkpoints import read_checkpoint_weights
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import check_free
from jaxguard.utils.hub import fetch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="from hf_to_flax.py, or a training run's folder")
    parser.add_argument("--step", type=int, help="which checkpoint of a run; the newest otherwise")
    parser.add_argument("--source", required=True, help="the checkpoint that it started from: a folder, or on the hub")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the whole model is held at once: host memory is the larger
    try:
        check_free(args.output)
        source = fetch(args.source, args.revision)
        report = export_hf(read_checkpoint_weights(args.checkpoint, step=args.step), source, args.output)
    except JaxguardError as error:
        parser.exit(2, f"error: {error}\n")
    print(
        f"wrote {args.output}: {report.changed_fraction:.2%} of {report.values:,} stored weights differ from {source}"
    )


if __name__ == "__main__":
    main()
