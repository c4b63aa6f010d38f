"""Checkpoints by name: a local folder, or a repository on the Hugging Face hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import huggingface_hub
from huggingface_hub import errors
from pydantic import Field

from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import absent
from jaxguard.utils.parse import read_json

if TYPE_CHECKING:
    from transformers import AutoConfig, AutoTokenizer

CHECKPOINT_FILES = (
    "*.safetensors", "*.json", "*.jinja", "*.yaml", "tokenizer*", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""What a checkpoint needs; repositories often hold the same weights in other formats besides."""

HTTP_ERROR: type[Exception] = next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
"""Of every failed request: httpx's or httpx2's, whichever this version of huggingface_hub uses."""
_IGNORED = ["original/*", "consolidated*", "onnx/*", "runs/*"]
_REFUSALS: dict[type[Exception], str] = {
    errors.GatedRepoError: "{name} is gated: accept its terms at https://huggingface.co/{name} while logged in, then set "
    "HF_TOKEN to a token of that account (https://huggingface.co/settings/tokens), or run `hf auth login`",
    errors.RepositoryNotFoundError: "no repository {name!r} on the hub, nor a folder of that name: check the spelling; if it is "
    "private, set HF_TOKEN to a token that may read it",
    errors.RevisionNotFoundError: "{name} has no revision {revision!r}: see https://huggingface.co/{name}/commits",
    errors.HFValidationError: "{name!r} is neither a folder nor a repository id: {error}",
    errors.LocalEntryNotFoundError: "{name} at revision {revision!r} is not in the local cache and the hub cannot be reached: "
    "check the connection, unset HF_HUB_OFFLINE if it is set, or give the path of a local folder",
    errors.HfHubHTTPError: "the hub refused {name} at revision {revision!r}: {error}",
    HTTP_ERROR: "the download of {name} broke off: {error}; run again, it continues",
}
"""What the hub's errors mean, those of a subclass first."""


@dataclass(frozen=True)
class TextFields:
    """Numbers of a config.json, or of its text_config; transformers makes lists of the layers before it looks at their number."""

    num_hidden_layers: Annotated[int, Field(strict=True, ge=0, le=4096)] | None = None
    max_position_embeddings: Annotated[int, Field(strict=True, gt=0)] | None = None


@dataclass(frozen=True)
class ConfigFile(TextFields):
    """A config.json before transformers reads it."""

    text_config: TextFields | None = None


def load_pretrained(auto: "type[AutoConfig] | type[AutoTokenizer]", folder: Path, what: str) -> Any:
    """Read a checkpoint's config or tokenizer with transformers; code that the folder brings along is never run.

    Raises:
        JaxguardError: transformers cannot read it, or only with that code.
    """
    if (path := folder / "config.json").is_file():
        read_json(path, ConfigFile)
    try:
        return auto.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of a broken file anything; the Rust side raises bare Exception
        if "trust_remote_code" in str(error):
            raise JaxguardError(
                f"{folder} needs code of its own (auto_map in config.json or tokenizer_config.json), which jaxguard never "
                "runs: use a checkpoint of a model type that transformers knows"
            ) from None
        raise JaxguardError(f"{folder}: transformers cannot read its {what}: {str(error)[:1000]}") from None


def fetch(checkpoint: str, revision: str | None = None, only: Sequence[str] | None = None) -> Path:
    """Return the local folder of a checkpoint, downloaded first (or continued) where it is a repository on the hub.

    Args:
        checkpoint: a folder, or a repository id such as "google/gemma-3-4b-it".
        revision: branch, tag or commit on the hub.
        only: patterns of the files to download; None takes CHECKPOINT_FILES.

    Raises:
        JaxguardError: no such folder or repository or revision, a gated one without access, or no connection.
    """
    folder = local_folder(checkpoint)
    if folder is not None:
        return folder
    try:
        local = huggingface_hub.snapshot_download(
            checkpoint, revision=revision, allow_patterns=list(only or CHECKPOINT_FILES), ignore_patterns=_IGNORED
        )
        return Path(local)
    except tuple(_REFUSALS) as error:
        meaning = next(text for kind, text in _REFUSALS.items() if isinstance(error, kind))
        raise JaxguardError(meaning.format(name=checkpoint, revision=revision or "main", error=error)) from None


def local_folder(checkpoint: str) -> Path | None:
    """Return a checkpoint's folder; None if it can only be on the hub. JaxguardError: it is neither folder nor repository id."""
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
            f"no folder {checkpoint!r}, and it is not a hub repository either: {absent(folder)}; a repository is written owner/name"
        )
    return None


def push(files: Mapping[str, Path | bytes], repository: str, private: bool = True) -> str:
    """Upload files (path in the repository -> file or contents) in one commit, into a repository that is made if need be.

    Returns:
        The address of the commit.

    Raises:
        JaxguardError: not a repository's name, nobody is logged in or may write there, or no connection.
    """
    login = (
        "run `hf auth login`, or set HF_TOKEN to a token that may write there (https://huggingface.co/settings/tokens)"
    )
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        operations = [huggingface_hub.CommitOperationAdd(name, file) for name, file in files.items()]
        return str(
            api.create_commit(repository, operations, commit_message="Upload a guard trained with jaxguard").commit_url
        )
    except errors.HFValidationError as error:
        raise JaxguardError(f"{repository!r} is no repository id: {error}") from None
    except errors.LocalTokenNotFoundError:
        raise JaxguardError(f"cannot upload to {repository}: you are not logged in; {login}") from None
    except errors.HfHubHTTPError as error:
        denied = error.response is not None and error.response.status_code in (401, 403, 404)
        raise JaxguardError(f"the hub refused {repository}: {error}{f'; {login}' if denied else ''}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise JaxguardError(f"the hub's answer about {repository} is malformed: {error!r}") from None
    except (errors.OfflineModeIsEnabled, OSError, HTTP_ERROR) as error:
        raise JaxguardError(
            f"cannot upload to {repository}: {error}; what was uploaded is not uploaded again"
        ) from None
