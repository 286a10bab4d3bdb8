"""The one exception for mistakes a user can make."""

LONGEST = 1000  # characters of a sentence; what is left out of a longer one is its middle


def one_line(text: str) -> str:
    """A text that may quote a file which anybody has written, as it can be printed.

    Line ends and whatever else a terminal would obey rather than show become escapes, and a
    quotation without end is cut.
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(shown) > LONGEST:
        shown = f"{shown[: LONGEST // 2 - 5]} ... {shown[-LONGEST // 2 :]}"
    return shown


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message is one sentence that says what to change.  Entry points print it without a
    traceback and exit 1; anything else that escapes is a bug and keeps its traceback.

    Args:
      message: the sentence; what a terminal would obey in it is escaped, and a long one is cut.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))
