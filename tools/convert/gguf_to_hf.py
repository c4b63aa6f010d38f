"""A GGUF file of llama architecture -> a Hugging Face folder: `gguf_to_hf.py --source FILE --output DIR`."""

import argparse
from pathlib import Path

from jaxguard.errors import JaxguardError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="float32 is exact")
    args = parser.parse_args()
    try:
        try:
            from jaxguard.models.gguf import gguf_to_hf
        except ModuleNotFoundError as error:
            raise JaxguardError(f"{error}: install it with pip install 'jaxguard[gguf]'") from None
        gguf_to_hf(args.source, args.output, args.dtype)
    except JaxguardError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
