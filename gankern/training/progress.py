"""What a run shows while it trains: a live bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

SECONDS_PER_LINE = 10.0


class Progress:
    """Kimg, images/s, losses and time left, on the error output.

    Args:
        total: images of the whole run.
        start: images seen before (a resumed run).
        run: the run folder; None is silent (all processes but the first).
    """

    def __init__(self, total: int, start: int, run: Path | None) -> None:
        self.total, self.start, self.run = total, start, run
        self.began = self.last_line = time.monotonic()
        self.losses = ""
        self.bar = None
        if run and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn
            from rich.progress import Progress as RichProgress

            columns = (BarColumn(), "{task.percentage:3.0f}%", "{task.fields[text]}")
            self.bar = RichProgress(*columns, console=Console(stderr=True), refresh_per_second=4)
            self.task = self.bar.add_task("", total=total, completed=start, text="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, cur_nimg: int) -> None:
        """Moves the bar."""
        if self.bar:
            self.bar.update(self.task, completed=cur_nimg, text=self._text(cur_nimg))

    def tick(self, cur_nimg: int, row: dict[str, Any]) -> None:
        """Takes a new line of statistics; without a bar, prints it if it is time for it."""
        self.losses = f"  D {row['loss_D']:.3f}  G {row['loss_G']:.3f}"
        now = time.monotonic()
        due = now - self.last_line >= SECONDS_PER_LINE or cur_nimg >= self.total
        if self.run and not self.bar and due:
            self.last_line = now
            print(self._text(cur_nimg), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.bar:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.run:
            print(text, file=sys.stderr, flush=True)

    def _text(self, cur_nimg: int) -> str:
        rate = (cur_nimg - self.start) / max(time.monotonic() - self.began, 1e-9)
        left = round(max(self.total - cur_nimg, 0) / rate) if rate else 0
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
        kimg = f"{cur_nimg / 1000:.1f}/{self.total / 1000:.1f} kimg"
        return f"{kimg}  {rate:.0f} img/s{self.losses}  {clock} left"
