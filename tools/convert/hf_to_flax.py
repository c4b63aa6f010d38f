"""A Hugging Face checkpoint -> an Orbax checkpoint: `hf_to_flax.py --source HF --output DIR`."""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxguard.data.format.template import load_tokenizer
from jaxguard.models.hf_io.checkpoints import copy_companions, read_weights
from jaxguard.models.spec import read_spec
from jaxguard.models.weights import abstract, count
from jaxguard.train.checkpoints import write_checkpoint_weights
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import whole_folder
from jaxguard.utils.hub import fetch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, help="a Hugging Face folder, or a repository on the hub")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the arrays")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the whole model is held at once: host memory is the larger
    try:
        source = fetch(args.source, args.revision)
        spec = read_spec(source)
        load_tokenizer(source, chat=False)
        size = count(abstract(spec)) * jnp.dtype(args.dtype).itemsize
        with whole_folder(args.output, size) as folder:
            copy_companions(source, folder)
            write_checkpoint_weights(folder, read_weights(source, spec, dtype=args.dtype), spec.fingerprint)
    except JaxguardError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
