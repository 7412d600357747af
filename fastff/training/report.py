"""What a run shows and writes: a live display (rich, where installed), metrics.csv, TensorBoard events."""

import contextlib
import csv
import io
import sys
import time
from pathlib import Path

import torch

from fastff.training.checkpoint import write_atomically
from fastff.training.state import means

MINUTE = 60.0  # seconds between lines within an epoch


class Report:
    """Shows and writes what fit does: a live display, and with a folder metrics.csv and TensorBoard events.

    On a terminal with rich the display is a bar and a table of the blocks. Elsewhere (a pipe, a log, a notebook) it is one line for each epoch,
    and a line each minute within a long one. metrics.csv is always written as
    a whole, so that a resumed run leaves no row twice. fit calls start, update, epoch and close, in this order."""

    def __init__(self, out, show):
        self.out, self.show = out, show
        self.live, self.events, self.first = None, None, None

    def start(self, trainer, epochs, batches):
        """Begin. trainer: for its names, device and steps. epochs: in all phases together. batches: in an epoch."""
        self.names, self.device, self.epochs, self.batches = trainer.names, trainer.device, epochs, batches
        self.began = time.perf_counter()
        self.shown = 0.0 if sys.stderr.isatty() else self.began
        if self.out is not None:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.events = SummaryWriter(str(Path(self.out) / "events"), purge_step=trainer.steps)
        if self.show and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from rich.console import Console
                from rich.live import Live

                console = Console(stderr=True)
                if not console.is_dumb_terminal:  # which cannot move the cursor
                    self.live = Live(console=console, refresh_per_second=4, transient=True)
                    self.live.start()

    def close(self):
        """End, also after an error."""
        if self.live is not None:
            self.live.stop()
        if self.events is not None:
            self.events.close()

    def epoch(self, history):
        """Show and write the end of an epoch, the last row of the history."""
        if self.show:
            self._print(self._epoch_line(_known(history[-1])))
        if self.out is not None:
            self._write(history)

    def _write(self, history):
        columns = list(dict.fromkeys(key for row in history for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(map(_known, history))
        write_atomically(Path(self.out) / "metrics.csv", lambda file: file.write(text.getvalue().encode()))
        if self.events is not None:
            for key, value in _known(history[-1]).items():
                self.events.add_scalar(key.replace(" ", "/", 1), value, history[-1]["step"])
            self.events.flush()

    def update(self, state, images_per_second):
        """Show a step: at most twice a second in the live display, since looking at the losses waits for the device, else once a minute."""
        done = state.position["epoch"] * self.batches + state.position["batch"]
        if self.first is None:
            self.first = done - 1
        now = time.perf_counter()
        if not self.show or now - self.shown < (MINUTE if self.live is None else 0.5):
            return
        self.shown = now
        if self.live is None:
            self._print(f"epoch {state.position['epoch'] + 1:3d}/{self.epochs} {self._pace(images_per_second, done)}")
        else:
            self.live.update(self._display(state, images_per_second, done))

    def _pace(self, images_per_second, done):
        """Return how much is done, the time that is left and the speed."""
        total = self.epochs * self.batches
        left = (time.perf_counter() - self.began) * (total - done) / max(1, done - self.first)
        return f"{done / total:.0%}, {_clock(left)} left, {images_per_second:,.0f} images/s{_memory(self.device)}"

    def _display(self, state, images_per_second, done):
        """Return a bar, and loss and accuracy of the blocks that have a loss, in as many columns as fit into the terminal."""
        from rich import columns, console, constrain, progress_bar, table, text

        line = table.Table.grid(*(table.Column(no_wrap=True) for _ in range(3)), padding=(0, 1))
        bar = progress_bar.ProgressBar(total=self.epochs * self.batches, completed=done, width=12)
        line.add_row(f"epoch {state.position['epoch'] + 1} of {self.epochs}", bar, self._pace(images_per_second, done))
        width = min(30, max(map(len, self.names)))  # the end of a long path tells more than its beginning
        blocks = [
            text.Text(f"{name[-width:]:{width}} {loss:7.3f}" + ("" if accuracy != accuracy else f" {accuracy:6.1%}"))
            for name, loss, accuracy in zip(self.names, *means(state.totals), strict=True)
            if loss == loss  # NaN is of a block that is not trained, or by another rank
        ]
        title = "loss and accuracy of each block"
        losses = columns.Columns(blocks, padding=(0, 3), equal=True, column_first=True, title=title)
        # Ctrl-C is echoed behind the last row: at the terminal's edge it would wrap and push the display up.
        return constrain.Constrain(console.Group(line, losses), self.live.console.width - 3)

    def _print(self, line):
        """Print a line that stays."""
        if self.live is not None:
            self.live.console.print(line, highlight=False, soft_wrap=True)
        else:
            self.shown = time.perf_counter()
            notebook = type(sys.stderr).__module__.startswith("ipykernel")  # shows stderr as if it were a failure
            print(line, file=sys.stdout if notebook else sys.stderr, flush=True)

    def _epoch_line(self, row):
        """Return the line of an epoch."""
        losses = [value for key, value in row.items() if key.startswith("train loss")]
        accuracies = [value for key, value in row.items() if key.startswith("train accuracy")]
        best, vote = ("best block", "vote on test") if len(self.names) > 1 else ("train", "test")
        line = f"epoch {row['epoch']:3d}/{self.epochs} {row['seconds']:7.1f} s"
        line += f"  loss {losses[-1]:.3f}" if losses else "  untrained"
        if accuracies:
            line += f"  {best} {max(accuracies):6.1%}"
        if (test := row.get("test vote")) is not None:
            line += f"  {vote} {test:6.1%}"
        return line


def _known(row):
    """Return a row of the history without what it does not know (NaN): of blocks that were not trained, or accuracies without labels."""
    return {key: value for key, value in row.items() if value == value}


def _clock(seconds):
    """Return seconds as 45 s, 12 min or 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _memory(device):
    """Return what is said of the peak memory of the GPU, or of this process; nothing where the system does not say it (Windows)."""
    if device.type == "cuda":
        return f", {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB of the GPU"
    try:
        import resource
    except ImportError:
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f", {peak / (2**20 if sys.platform == 'darwin' else 2**10):,.0f} MiB at peak"
