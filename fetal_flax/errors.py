"""The exceptions that become one sentence and an exit code, and what a sentence may quote."""

import os


class InputError(Exception):
    """Bad input from the user: a file, a setting, a command line.

    The message is one sentence that names the file or field and the way out; the command line
    prints it to stderr without a traceback.

    Example:
        >>> try:
        ...     ff.load("nowhere")
        ... except ff.InputError as error:
        ...     print(str(error).partition(":")[0])
        nowhere holds no checkpoint
    """

    exit_code = 2


class InputWarning(UserWarning):
    """Input that is used though something about it can't be right.

    The message is one sentence; the command line prints it to stderr and goes on.
    """


class RunError(Exception):
    """A training run that can't go on, through no fault of its settings or files.

    The message says at which step, what is saved, and how to go on.
    """

    exit_code = 1


class Interrupted(Exception):  # noqa: N818  It is a request, not an error.
    """A run that was asked to stop and can be resumed."""

    exit_code = 75
    """`EX_TEMPFAIL` of sysexits.h: try again later."""


def printable(text: str) -> str:
    """Returns text from a file on one line, without control characters and not endless."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 100 else text[:100] + "…"


def one_line(text: str) -> str:
    """Returns a sentence without line breaks and control characters, which a name may bring."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def file_name(name: str) -> str:
    """Returns a file's name as text; bytes of it that are not UTF-8 come escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
