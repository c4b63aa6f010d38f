"""The exceptions a user is meant to read."""

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
