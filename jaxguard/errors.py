"""The one exception a user is meant to read."""


class JaxguardError(Exception):
    """A mistake the user can mend. The message names the field, file or example and says what to do.

    Every door prints it without a traceback and exits with code 2.
    """
