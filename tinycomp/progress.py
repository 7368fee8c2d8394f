"""Progress bars for work that takes more than a moment; silent when not wanted."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Bars:
    """One bar per description, on stderr."""

    def __init__(self, enabled: bool) -> None:
        columns = (
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not enabled, transient=True)
        self._tasks: dict[str, object] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, description: str, done: int, total: int, note: str = "") -> None:
        """Show `done` of `total`, and `note`, on the bar with this description; it is made when first named."""
        if description not in self._tasks:
            self._tasks[description] = self._progress.add_task(description, total=total, note=note)
        self._progress.update(self._tasks[description], completed=done, total=total, note=note)  # type: ignore[arg-type]
