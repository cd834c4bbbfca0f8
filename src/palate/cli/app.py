"""The entry point: options that every command has, errors and their exit codes, the log, the groups of the help.

Exit codes: 0 ok, 1 an error of our own or a replayed step that no longer fails, 2 bad input, 3 losses not finite,
4 checkpoint or disk, 5 reward service or black-box objective, 6 out of memory, 7 another rank is lost, 129, 130 and 143
signals.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import shutil
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from palate.runtime.errors import CheckpointError, InputError, PalateError, PeerAbortedError
from palate.runtime.files import with_remedy
from palate.runtime.progress import printable

MAX_LINES = 12  # of an error message
OTHER_SIGNS = {
    "−": "-",
    "–": "-",
    "±": "+-",
    "→": "->",
    "×": "x",
    "·": "|",
    "…": "...",
}  # for an output that lacks them
GLOBAL_OPTIONS = {"-q": "--quiet", "--quiet": "--quiet", "-v": "--verbose", "--verbose": "--verbose"}
TRAIN, LOOK, SHARE, CHECK = "Train", "Look", "Share", "Check"  # the groups of the help


class Groups(TyperGroup):
    """A help whose commands stand in groups."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section per group; `rich_help_panel` of a command names its group."""
        named = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        width = max(len(name) for name, _ in named)
        for group in (TRAIN, LOOK, SHARE, CHECK):
            rows = [
                (name.ljust(width), command.get_short_help_str(formatter.width - 6 - width))
                for name, command in named
                if getattr(command, "rich_help_panel", None) == group and not command.hidden
            ]
            if rows:
                with formatter.section(group):
                    formatter.write_dl(rows)


app = typer.Typer(
    cls=Groups,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Align text-to-image models with a preference.",
    epilog="\b\nBegin with:\n  palate recipes             what can be run\n"
    "  palate train srpo-emoji    two minutes on two cores, nothing to download",
)


def examples(*lines: str) -> str:
    """The last part of a command's help: commands to copy."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"palate {version('palate')}")
        raise typer.Exit


@app.callback()
def global_options(
    ctx: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More notes on what happens.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Set up the log; these options may stand anywhere on the command line."""
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose exclude each other; give one of them")
    ctx.obj = {"quiet": quiet}
    set_up_log(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


def set_up_log(level: int) -> None:
    """Send the `palate` logger to stderr: coloured on a terminal, plain lines otherwise."""
    logger = logging.getLogger("palate")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        logger.addHandler(
            RichHandler(console=Console(stderr=True), show_time=False, show_path=False, show_level=level < logging.INFO)
        )
    else:
        plain = logging.StreamHandler(sys.stderr)
        plain.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(plain)
    for handler in logger.handlers:
        handler.addFilter(_strip_controls)
        handler.addFilter(lambda record: not record.__dict__.get("shown"))  # a live line has printed it
    logger.setLevel(level)
    logger.propagate = False


def _strip_controls(record: logging.LogRecord) -> bool:
    """Prompts and paths in a message cannot drive the terminal."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def print_everywhere() -> None:
    """No sign ends a command: what the output's encoding lacks is written in other signs, or as a question mark."""
    codecs.register_error("other signs", _in_other_signs)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="other signs")


def _in_other_signs(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), "an output encodes"
    return "".join(OTHER_SIGNS.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


def main() -> None:
    """Run the command line: errors that a user can fix take a few lines, --debug shows where they come from."""
    print_everywhere()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    front = [GLOBAL_OPTIONS[argument] for argument in arguments if argument in GLOBAL_OPTIONS]
    arguments = [*dict.fromkeys(front), *(argument for argument in arguments if argument not in GLOBAL_OPTIONS)]
    if not debug:  # the libraries' own talk while they load; read when they are imported
        for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            os.environ.setdefault(name, "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        warnings.showwarning = _show_warning
    try:
        require_here()
        code = app(arguments or ["--help"], prog_name="palate", standalone_mode=False)
    except BaseException as error:  # every kind gets its exit code; an error of our own keeps its traceback
        if debug and not isinstance(error, (SystemExit, typer.Exit)):
            raise
        code = exit_code_of(error)
    if "RANK" in os.environ:
        from palate.runtime.distributed import exit_process

        exit_process(code if isinstance(code, int) else 0)
    sys.exit(code if isinstance(code, int) else 0)


def require_here() -> None:
    """InputError: the current folder is gone, in which torch does not even load."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise InputError("the current folder was deleted or moved; change into one that is there, as `cd ~`") from error


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """Palate's own warnings are sentences for the user; others keep the form that their makers look for."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1]):
        print(f"palate: {printable(str(message))}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def exit_code_of(error: BaseException) -> int:
    """Say what was wrong; the exit code. An error that nobody raised on purpose goes on, with its traceback."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return 130
    if usage := getattr(error, "format_message", None):  # a mistake in the options, from typer
        text = usage() or "no command; see palate --help"
        if text.startswith("Usage:"):  # a group without a command: its help, as it is laid out
            print(text, file=sys.stderr)
        else:
            say(text + suggestion(error, sys.argv[1:]))
        return 2
    if isinstance(error, PeerAbortedError):  # another rank has said it
        return error.exit_code
    if isinstance(error, PalateError):
        say(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        say(with_remedy(error))
        return CheckpointError.exit_code
    raise error


def suggestion(error: BaseException, arguments: list[str]) -> str:
    """ "; did you mean trainer.steps=3?" for an unknown option that is a key of recipes; else nothing."""
    option = getattr(error, "option_name", None)
    if not option or not {"train", "resume", "optimize", "plan", "doctor"} & set(arguments):
        return ""
    from palate.recipe import algorithm_settings, homes_of

    name, _, value = option.lstrip("-").partition("=")
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments) and not argument.startswith("---"):
            value = value or arguments[i + 1]
        elif argument.startswith(option + "="):
            value = value or argument.partition("=")[2]
    keys = homes_of(name.replace("-", "_"), algorithm_settings("srpo"))
    return f"; did you mean {' or '.join(f'{key}={value}' for key in keys)}?" if keys else ""


def say(message: str) -> None:
    """An error on stderr, in at most MAX_LINES lines without control characters."""
    lines = [printable(line) for line in message.splitlines() if line.strip()] or ["unknown error"]
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], f"... and {len(lines) - MAX_LINES} more"]
    rank = f"rank {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
    width = max(200, shutil.get_terminal_size((200, 24)).columns * 3)
    for number, line in enumerate(lines):
        cut = line if len(line) <= width * 2 else line[: width * 2] + "..."
        print((f"palate: {rank}" if number == 0 else "        ") + cut, file=sys.stderr)
    sys.stderr.flush()
