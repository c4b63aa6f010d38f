"""Checkpoints by name: a local folder, or a repository on the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from jaxguard.utils.errors import JaxguardError

CHECKPOINT_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.yaml",
    "tokenizer*",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""What a checkpoint needs; repositories often hold the same weights in other formats besides."""

_IGNORED = ("original/*", "consolidated*", "onnx/*", "runs/*")


def fetch(checkpoint: str, revision: str | None = None, only: Sequence[str] | None = None) -> Path:
    """The local folder of a checkpoint, downloaded first (or continued) where it is a repository on the hub.

    Args:
        checkpoint: a folder, or a repository id such as "google/gemma-3-4b-it".
        revision: branch, tag or commit on the hub.
        only: file patterns to download; None takes CHECKPOINT_FILES.

    Raises:
        JaxguardError: no such folder or repository or revision, a gated one without access, or no connection.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        raise JaxguardError(
            f"{checkpoint} is a GGUF file: convert it first with tools/convert/gguf_to_hf.py --source {checkpoint} "
            "--output FOLDER, then use FOLDER"
        )
    if folder.exists():
        raise JaxguardError(f"{checkpoint} is a file; a checkpoint is a folder with config.json and *.safetensors")
    if checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") != 1:
        raise JaxguardError(
            f"no folder {checkpoint!r}, and it is not a hub repository either: those are written owner/name"
        )
    return _download(checkpoint, revision, tuple(only) if only is not None else CHECKPOINT_FILES)


def _download(repository: str, revision: str | None, only: tuple[str, ...]) -> Path:
    page = f"https://huggingface.co/{repository}"
    at = f" at revision {revision!r}" if revision else ""
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(only), ignore_patterns=list(_IGNORED)
        )
    except errors.GatedRepoError:
        raise JaxguardError(
            f"{repository} is gated: accept its terms at {page} while logged in, then set HF_TOKEN to a token of that "
            "account (https://huggingface.co/settings/tokens), or run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise JaxguardError(
            f"no repository {repository!r} on the hub, nor a folder of that name: check the spelling; "
            "if it is private, set HF_TOKEN to a token that may read it"
        ) from None
    except errors.RevisionNotFoundError:
        raise JaxguardError(f"{repository} has no revision {revision!r}: see {page}/commits") from None
    except errors.HFValidationError as error:
        raise JaxguardError(f"{repository!r} is neither a folder nor a repository id: {error}") from None
    except errors.LocalEntryNotFoundError:
        raise JaxguardError(
            f"{repository}{at} is not in the local cache and the hub cannot be reached: check the connection, unset "
            "HF_HUB_OFFLINE if it is set, or give the path of a local folder"
        ) from None
    except errors.HfHubHTTPError as error:
        raise JaxguardError(f"the hub refused {repository}{at}: {error}") from None
    return Path(folder)
