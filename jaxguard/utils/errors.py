"""The exceptions a user is meant to read."""


class JaxguardError(Exception):
    """A mistake the user can mend. The message names the field, file or example and says what to do.

    Every door prints it without a traceback and exits with code 2.
    """


class ProvenanceError(JaxguardError):
    """A folder holds what was made of other inputs, and nothing may be mixed with it.

    Doors exit with code 3, so that a study can put the old output aside.
    """
