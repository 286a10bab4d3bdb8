"""The one exception for mistakes a user can make."""


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message is one sentence that says what to change.  Entry points print it without a
    traceback and exit 1; anything else that escapes is a bug and keeps its traceback.
    """
