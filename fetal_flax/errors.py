"""The one exception that means "the user can fix this"."""


class InputError(Exception):
    """Bad input from the user: a file, a setting, a command line.

    The message is one sentence that names the file or field and the way out; the command line
    prints it to stderr without a traceback and exits with code 2.
    """
