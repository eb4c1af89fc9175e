"""What the demo shows in the terminal: with rich where that is installed, else plain text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distgrad.launch.demo_world import Traffic, World

__all__ = ["RichView", "View", "new_view"]


class View:
    """Plain lines; one an epoch."""

    def say(self, text: str) -> None:
        """Print one line, at once."""
        print(text, flush=True)

    def on_start(self, world: World) -> None:
        """Show the workers."""
        self.say(f"{len(world.names)} workers, transport {world.transport}")
        for name in world.names:
            process = world.processes.get(name)
            place = f"process {process.pid if process else os.getpid()}"
            self.say(f"  {name:<8}{place if world.processes else 'a thread'}")

    def on_gradients(self, difference: float) -> None:
        """Show how far distributed gradients are from those of a single process."""
        exact = " (equal to the last bit)" if difference == 0 else ""
        self.say("one step against the same network in one process:")
        self.say(f"  largest relative difference of a gradient: {difference:.1e}{exact}")

    @contextmanager
    def progress(self, epochs: int, steps: int) -> Iterator[None]:
        """Surround the training of so many epochs of so many steps."""
        yield

    def on_step(self, loss: float) -> None:
        """Show that a step is done."""

    def on_epoch(self, epoch: int, loss: float, accuracy: float) -> None:
        """Show the mean loss and the test accuracy of an epoch."""
        self.say(f"epoch {epoch:3}   loss {loss:.4f}   test accuracy {accuracy:6.2%}")

    def on_end(self, accuracy: float, traffic: Traffic, seconds: float) -> None:
        """Show the result and what it took."""
        calls, rate = traffic.requests / seconds, traffic.nbytes / seconds / 1e6
        self.say(f"test accuracy {accuracy:.2%} after {seconds:.1f} s of training")
        self.say(f"  {traffic.requests:,} calls, {calls:,.0f} a second; {rate:,.1f} MB a second")

    def on_pictures(self, *paths: Path) -> None:
        """Show where the pictures are."""
        for path in paths:
            self.say(f"drawn: {path}")


class RichView(View):
    """A progress bar and some colour, by rich."""

    def __init__(self, console: Any, progress: Any) -> None:
        self.console = console
        self.bar = progress

    def say(self, text: str) -> None:
        """Print one line above the progress bar."""
        self.console.print(text)

    @contextmanager
    def progress(self, epochs: int, steps: int) -> Iterator[None]:
        """Show the bar."""
        self.task = self.bar.add_task("training", total=epochs * steps, state="")
        with self.bar:
            yield

    def on_step(self, loss: float) -> None:
        """Advance the bar."""
        self.bar.advance(self.task)

    def on_epoch(self, epoch: int, loss: float, accuracy: float) -> None:
        """Show loss and accuracy behind the bar."""
        state = f"epoch {epoch}  loss {loss:.4f}  test accuracy {accuracy:.1%}"
        self.bar.update(self.task, state=state)


def new_view() -> View:
    """Return the best view there is: rich only on a terminal, and if installed."""
    if not sys.stdout.isatty():
        return View()
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return View()
    console = Console(highlight=False, markup=False)
    columns = (BarColumn(40), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn())
    return RichView(
        console, Progress(*columns, TextColumn("{task.fields[state]}"), console=console)
    )
