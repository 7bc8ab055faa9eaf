"""Generates command lines from types, with every refusal on one line.

tyro builds the parser from a dataclass or a function. Its own error is a box of several lines; people who read logs, and programs
that read stderr, want one line that names the fault and the way out. ``parse`` keeps tyro's words and its exit code (2) and drops
the box.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import inspect
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import tyro

from stabilitylab import __version__
from stabilitylab.errors import InputError, run_command

# Packages that only some commands need -> the extra that installs them.
_EXTRAS = {"cattrs": "glm", "scipy": "glm", "sentencepiece": "glm"}
_BOX = re.compile(r"[╭╮╰╯│─┌┐└┘]+")
# Number of checks by a waiting OpenMP thread before it sleeps: GNU's own for more threads than cores.
_SPINS = "1000"


def run_program(program: str, commands: Mapping[str, tuple[str, str]], words: Sequence[str] | None) -> int:
    """Run a program whose first word is a command; returns the exit code.

    A command's function has the command's name and gets its parsed arguments; or it is named ``NAME_command`` and parses its words
    itself. The program imports its module only when it calls it, so that help and errors are quick.

    Args:
        program: its name.
        commands: name -> (module, summary).
        words: the command line; None: this process's.
    """
    is_whole_process = words is None
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        return run_command(lambda: print(_usage(program, commands)))
    if words[0] == "--version":
        # Both programs belong to one distribution.
        return run_command(lambda: print(f"{program} {__version__}"))
    sleep_while_waiting()
    importing = _importing if is_whole_process else contextlib.nullcontext
    return run_command(lambda: _command(program, commands, words[0], words[1:], importing))


def _usage(program: str, commands: Mapping[str, tuple[str, str]]) -> str:
    width = max(map(len, commands)) + 1
    lines = (f"  {name:{width}} {summary}" for name, (_, summary) in commands.items())
    return "\n".join([f"usage: {program} COMMAND ...; each takes --help\n", *lines])


@contextlib.contextmanager
def imports_uncollected() -> Iterator[None]:
    """Pause the garbage collector within this context; it never visits the imported objects again, not even at the process's end.

    Modules live as long as the process. ``glm train`` imports some 200,000 objects, which Python's collector would visit several
    times during the imports, again whenever a quarter as many are new, and at the end: a third of a short command's processor time.
    Only for a process that runs this program alone, as older garbage would stay.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.freeze)
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def leave_at_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once in this context, which only imports and so has nothing to put in order.

    Packages catch exceptions of their own imports (of optional parts, of compiled ones). A KeyboardInterrupt that is caught there
    is lost, and what goes on is a package without half of its names.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # nohup's, or a caller's own
        yield
        return

    def leave(*_: object) -> None:
        os.write(2, b"interrupted\n")  # a signal may come in the middle of a print
        os._exit(130)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    with leave_at_interrupt(), imports_uncollected():
        yield


def sleep_while_waiting() -> None:
    """Let OpenMP threads that wait for each other sleep soon, on a machine whose cores are all busy already.

    Their results stay the same, bit for bit. GNU's runtime first spins some 300,000 times, fewer only where it has more threads
    itself than the machine has cores. On cores that other programs use as well, the awaited thread may have no core, and the
    waiting ones burn the time that it needs; on free cores spinning is quicker (RESULTS.md has both). The runtime reads its
    variables once, when torch loads it; the user's own settings stand.
    """
    if _is_busy() and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def _is_busy() -> bool:
    """Whether, in the last minute, as many processes wanted a core as the machine has."""
    try:
        return os.getloadavg()[0] >= (os.cpu_count() or 1)
    except (AttributeError, OSError):  # Windows has no such number
        return False


def _command(
    program: str,
    commands: Mapping[str, tuple[str, str]],
    name: str,
    words: Sequence[str],
    importing: Callable[[], AbstractContextManager[None]],
) -> int | None:
    if name not in commands:
        raise InputError(f"{program} has no command {name!r}: choose one of {', '.join(commands)}")
    try:
        with importing():
            module = importlib.import_module(commands[name][0])
    except ModuleNotFoundError as error:
        raise needs_extra(f"{program} {name}", error) from None
    takes_words = getattr(module, f"{name}_command", None)
    code: int | None = (
        takes_words(words)
        if takes_words is not None
        else parse(getattr(module, name), words, program=f"{program} {name}")
    )
    return code


def needs_extra(what: str, error: ModuleNotFoundError) -> Exception:
    """The error to raise for a missing package: names the extra that installs it, or is ``error`` itself if none is known."""
    extra = _EXTRAS.get((error.name or "").partition(".")[0])
    return (
        error
        if extra is None
        else InputError(f"{what} needs {error.name}: pip install 'stabilitylab[{extra}]'")
    )


def parse(
    form: Any, arguments: Sequence[str], *, program: str, description: str | None = None, default: Any = None
) -> Any:
    """Parse arguments into ``form``: make a type from them (``default`` fills in what they leave out), or call a function.

    Returns:
        The instance, or what the function returned.

    Raises:
        SystemExit: 0 after ``--help``; 2, after one line on stderr, when the arguments do not fit.
    """
    said = io.StringIO()
    try:
        # tyro prints its box to stderr and exits. A function runs after parsing, with the real stderr again.
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                _deferred(form) if inspect.isfunction(form) else form,
                prog=program,
                description=description,
                default=tyro.MISSING_NONPROP if default is None else default,
                args=list(arguments),
                config=(tyro.conf.ConsolidateSubcommandArgs, tyro.conf.HelptextFromCommentsOff),
            )
    except SystemExit as stop:
        if stop.code == 2:
            print(f"error: {_sentence(said.getvalue())} (see {program} --help)", file=sys.stderr)
        raise
    return parsed() if inspect.isfunction(form) else parsed


def _deferred(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """A function of the same signature that only binds the arguments."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(function, *args, **kwargs)

    return bind


def _sentence(box: str) -> str:
    """The text of tyro's box between its title and its first rule."""
    body: list[str] = []
    for line in box.splitlines()[1:]:
        text = _BOX.sub(" ", line).strip()
        if not text and body:
            break
        body.append(text)
    said = " ".join(" ".join(body).split())
    said = said.replace("__tyro-dummy-inner__.", "").replace("Error parsing config.", "Error parsing ")
    return re.sub(r"^Error parsing ([\w.\-]+): ", r"\1: ", said) or "the arguments do not fit"
