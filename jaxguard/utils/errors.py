"""The exceptions a user is meant to read."""

import traceback
from pathlib import Path

from jaxguard.utils.secrets import mask


class JaxguardError(Exception):
    """A mistake that the user can fix. The message names the field, file or example and says what to do; secrets in it are masked.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(mask(message))


class ProvenanceError(JaxguardError):
    """A folder holds output of other provenance, which must not be mixed with new output.

    The command line exits with code 3.
    """


def where(error: BaseException) -> str:
    """The type of an error and where it was raised; not its message, which may quote a text."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return f"{type(error).__name__} in {' > '.join(f'{Path(each.filename).name}:{each.lineno}' for each in frames)}"
