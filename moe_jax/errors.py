"""The exception for mistakes that a user can make."""

LONGEST = 1000  # characters of a message; the middle of a longer one is cut out


def one_line(text: str) -> str:
    """Make a text printable that may quote an untrusted file.

    Line ends and other characters that control a terminal become escapes, and a long text is cut.
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(shown) > LONGEST:
        shown = f"{shown[: LONGEST // 2 - 5]} ... {shown[-LONGEST // 2 :]}"
    return shown


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message says in one or two sentences what to change.  Entry points print it without a
    traceback and exit 1.  Any other exception that escapes is a bug and keeps its traceback.

    Args:
      message: the sentence; control characters in it are escaped, and a long one is cut.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))
