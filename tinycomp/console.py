"""What the command line prints: JSON for programs, tables for people, and how a command ends."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from tinycomp.errors import UsageError
from tinycomp.plain import plain

USAGE, REFUSED, GATE_FAILED, INTERRUPTED = 2, 3, 4, 130
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

out = Console()
err = Console(stderr=True, highlight=False)


def emit(value: dict[str, Any]) -> None:
    """Print one JSON object; a number that JSON does not have (inf, nan) becomes a string."""
    print(json.dumps(plain(value), indent=1))


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print rows as an aligned table; columns but the first are right-aligned when their cells are numbers."""
    view = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numeric = index > 0 and all(isinstance(row[index], (int, float, type(None))) for row in rows)
        view.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        view.add_row(*(cell(value) for value in row))
    out.print(view)


def cell(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the library's errors into one line on stderr (or JSON) and the exit code of their kind."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        if kwargs.get("as_json"):
            _silence()
        try:
            with _interrupts() as pressed:
                command(*args, **kwargs)
        except typer.Exit:  # a RuntimeError, but a decision that was made
            raise
        except (ValueError, TypeError, RuntimeError, OSError, MemoryError, SafetensorError, KeyboardInterrupt) as error:
            stopped = bool(pressed) or isinstance(error, KeyboardInterrupt)
            code = INTERRUPTED if stopped else USAGE if isinstance(error, UsageError) else REFUSED
            if os.environ.get("TINYCOMP_DEBUG"):
                raise
            nothing = "interrupted" if getattr(error, "__notes__", ()) else "interrupted; nothing was written"
            message = nothing if stopped else str(error) or type(error).__name__
            if not stopped and (getattr(error, "errno", None) in DISK_FULL or isinstance(error, SafetensorError)):
                message += "; free space there, or in the folder for temporary files"
            message = "; ".join([message, *getattr(error, "__notes__", ())])
            if kwargs.get("as_json"):
                emit({"error": message, "kind": type(error).__name__, "exit_code": code})
            err.print(f"error: {message}", markup=False, soft_wrap=True)
            raise typer.Exit(code) from error

    return run


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The signals of Ctrl-C so far: native code that meets the KeyboardInterrupt may raise its own error instead."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    handler = signal.getsignal(signal.SIGINT)
    ours = handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)


def _silence() -> None:
    """No progress bars of transformers on stderr: whoever asks for JSON is a program."""
    from transformers.utils import logging

    logging.disable_progress_bar()
