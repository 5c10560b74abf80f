"""The one exception that means "the user can fix this", and what its message may quote."""


class InputError(Exception):
    """Bad input from the user: a file, a setting, a command line.

    The message is one sentence that names the file or field and the way out; the command line
    prints it to stderr without a traceback and exits with code 2.
    """


def printable(text: str) -> str:
    """Returns text from a file on one line, without control characters and not endless."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 100 else text[:100] + "…"
