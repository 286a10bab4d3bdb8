"""The one exception for mistakes a user can make."""

LONGEST = 1000  # characters of a sentence; what is left out of it is its middle


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message is one sentence that says what to change.  Entry points print it without a
    traceback and exit 1; anything else that escapes is a bug and keeps its traceback.

    A message may quote a file that anybody has written: line ends and whatever else a terminal
    would obey rather than show are written as escapes, and a quotation without end is cut.
    """

    def __init__(self, message: str):
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        if len(shown) > LONGEST:
            shown = f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 2 :]}"
        super().__init__(shown)
