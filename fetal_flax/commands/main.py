"""The command line: finds the command, parses its flags, and turns errors into exit codes."""

import difflib
import functools
import logging
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import absl.logging
import tyro

from fetal_flax._util.cache_folder import check_temporary_files
from fetal_flax._util.compilation_cache import keep_compilations
from fetal_flax._util.console import harden_streams
from fetal_flax.commands.benchmark import Benchmark
from fetal_flax.commands.convert import Convert
from fetal_flax.commands.cross_validate import CrossValidate
from fetal_flax.commands.data_prepare import PrepareData
from fetal_flax.commands.evaluate import Evaluate
from fetal_flax.commands.export import Export
from fetal_flax.commands.parity import Parity
from fetal_flax.commands.predict import Predict
from fetal_flax.commands.run_settings import RunSettings
from fetal_flax.commands.submission import Submission
from fetal_flax.commands.summary import Summarize
from fetal_flax.commands.train import Train
from fetal_flax.config import DataConfig
from fetal_flax.errors import InputError, InputWarning, Interrupted, RunError, one_line, printable

COMMANDS: dict[str, Any] = {
    "train": Train,
    "cross-validate": CrossValidate,
    "convert": Convert,
    "evaluate": Evaluate,
    "predict": Predict,
    "submission": Submission,
    "export": Export,
    "parity": Parity,
    "summary": Summarize,
    "benchmark": Benchmark,
    "data prepare": PrepareData,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Command and flags; None takes the process's.

    Returns:
        The exit code: 0 done; 1 a run that can't go on, 2 bad input, 75 a training that was asked
        to stop and can be resumed, all with a sentence on stderr; 130 interrupted.
    """
    harden_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Orbax and Grain warn of their own settings, which no user can act on, and log errors that they
    # raise as well; OpenCV warns of broken files, which our own sentences name.
    absl.logging.set_verbosity(absl.logging.FATAL)
    # Without a home Matplotlib warns that it keeps its list of fonts among the temporary files.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    if arguments == ["--version"]:
        from fetal_flax import __version__

        print(f"fetal-flax {__version__}")
        return 0
    name = next((name for name in COMMANDS if arguments[: name.count(" ") + 1] == name.split()), "")
    if not name:
        if arguments[:1] in (["-h"], ["--help"]):
            print(_usage())
            return 0
        print(_usage(), file=sys.stderr)
        if arguments:
            print(f"\nfetal-flax: {_no_command(arguments[0])}", file=sys.stderr)
        return 2
    keep_compilations(DataConfig.cache_dir)
    flags = arguments[name.count(" ") + 1 :]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", InputWarning)
            warnings.showwarning = functools.partial(_show_warning, name, warnings.showwarning)
            return parse(name, flags).run()
    except (InputError, RunError, Interrupted) as error:
        print(f"fetal-flax {name}: {one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"fetal-flax {name}: {one_line(_sentence(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            print(f"fetal-flax {name}: {one_line(str(interrupt))}", file=sys.stderr)
        return 130


def parse(name: str, flags: Sequence[str]) -> Any:
    """Returns a command, ready to run.

    Raises:
        InputError: A setting is out of range, or the file that settings come from can't be used.
        SystemExit: A flag is unknown or malformed, or help was asked for; tyro has printed it.
    """
    command = COMMANDS[name]
    # Settings come from a file that flags name, and are the defaults of other flags.
    takes_settings = issubclass(command, RunSettings)
    default = command.before_flags(flags) if takes_settings else tyro.MISSING_NONPROP
    parsed = tyro.cli(command, prog=f"fetal-flax {name}", args=flags, default=default)
    if takes_settings and parsed.preset != default.preset:
        raise InputError(
            f"{printable(parsed.preset)} is no flag's value; a preset's name stands before all "
            "flags"
        )
    return parsed


def _sentence(error: OSError) -> str:
    """Returns what to say of an error of the system that no other code names, or raises it."""
    if error.filename is not None:
        # A name that is too long, a folder that may not be entered, a disk that is full.
        return (
            f"can't use {error.filename} ({error.strerror}): choose another path or make this one "
            "usable"
        )
    try:
        check_temporary_files()
    except InputError as missing:  # Matplotlib wants one where there is no home.
        return str(missing)
    raise error


def _show_warning(
    name: str, others: Callable[..., None], message: Warning | str, *details: Any, **options: Any
) -> None:
    """Prints our own warnings as sentences, and others as they come."""
    if isinstance(message, InputWarning):
        print(f"fetal-flax {name}: warning: {one_line(str(message))}", file=sys.stderr)
    else:
        others(message, *details, **options)


def _usage() -> str:
    lines = ["usage: fetal-flax COMMAND [FLAGS]; fetal-flax COMMAND --help tells its flags", ""]
    wrap = functools.partial(
        textwrap.fill, width=shutil.get_terminal_size().columns, subsequent_indent=" " * 17
    )
    lines += [wrap(f"  {name:14s} {command.__doc__}") for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "  --version      Print the version."])


def _no_command(given: str) -> str:
    if given.startswith("-"):
        return f"the command comes first, then flags like {printable(given)}"
    # `data` is near `data prepare`.
    words = {word: name for name in COMMANDS for word in (name, name.split()[0])}
    near = difflib.get_close_matches(given.lower(), words, n=1)
    hint = f"; did you mean {words[near[0]]}?" if near else ""
    return f"there is no command {printable(given) or repr(given)}{hint}"
