"""An export's steps on a terminal: one line each, with bytes and time left for those that count."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Steps:
    """Renders the steps that an export reports (`generator_svc.export.progress.Progress`).

    If the output is not a terminal, prints a line when each step begins.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            _OfBytes(DownloadColumn()),
            TimeElapsedColumn(),
            _OfBytes(TimeRemainingColumn()),
            console=console,
        )
        self._step = ""
        self._task: TaskID | None = None

    def __enter__(self) -> Steps:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._console.is_terminal:
            return
        if error is None:
            self._finish()
        self._bars.stop()

    def show(self, step: str, done: int = 0, total: int | None = None) -> None:
        if step != self._step:
            self._begin(step)
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)

    def _begin(self, step: str) -> None:
        self._step = step
        if not self._console.is_terminal:
            self._console.print(step, markup=False, highlight=False)
            return
        self._finish()
        self._task = self._bars.add_task(step, total=None)

    def _finish(self) -> None:
        if self._task is not None:
            last = self._bars.tasks[-1]
            end = last.total if last.total is not None else 1
            self._bars.update(last.id, completed=end, total=end)


class _OfBytes(ProgressColumn):
    """A column that is shown only for steps that count bytes."""

    def __init__(self, column: ProgressColumn) -> None:
        self._column = column
        super().__init__()

    def render(self, task: Task) -> Text:
        if task.total is None or task.total == 1:
            return Text("")
        shown = self._column.render(task)
        assert isinstance(shown, Text)
        return shown
