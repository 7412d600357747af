"""What a run shows and writes: a live display (rich, where installed), metrics.csv, TensorBoard events."""

import csv
import io
import sys
import time
from pathlib import Path

from fastff.training.checkpoint import write_atomically


def peak_resident_mb():
    """Peak resident memory of this process in MiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class Metrics:
    """Writes the history to metrics.csv (whole, so that a resumed run leaves no rows twice) and to TensorBoard where it is installed."""

    def __init__(self, out, names, step):
        self.path = None if out is None else Path(out) / "metrics.csv"
        self.events = None
        if out is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.events = SummaryWriter(str(Path(out) / "events"), purge_step=step)
            except ImportError:
                pass

    def write(self, history):
        if self.path is None:
            return
        columns = list(dict.fromkeys(key for row in history for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(history)
        write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))
        if self.events is not None:
            for key, value in history[-1].items():
                self.events.add_scalar(key.replace(" ", "/", 1), value, history[-1]["step"])
            self.events.flush()

    def close(self):
        if self.events is not None:
            self.events.close()


class Progress:
    """The live display of fit. On a terminal with rich: a bar and a table of the blocks; otherwise one line an epoch; or nothing."""

    def __init__(self, show, names, epochs, batches):
        self.show, self.names, self.epochs, self.batches = show, names, epochs, batches
        self.live, self.start, self.shown, self.first = None, time.perf_counter(), 0.0, None
        if show and sys.stderr.isatty():
            try:
                from rich.live import Live

                self.live = Live(refresh_per_second=4, transient=True)
            except ImportError:
                pass

    def __enter__(self):
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error):
        if self.live is not None:
            self.live.stop()

    def update(self, loop, images_per_second):
        done = loop.position["epoch"] * self.batches + loop.position["batch"]
        if self.first is None:
            self.first = done - 1
        if self.live is None or time.perf_counter() - self.shown < 0.5:
            return
        self.shown = time.perf_counter()
        self.live.update(self._table(loop, images_per_second, done))

    def _table(self, loop, images_per_second, done):
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        total = self.epochs * self.batches
        left = (time.perf_counter() - self.start) * (total - done) / max(1, done - self.first)
        if loop.device.type == "cuda":
            import torch

            memory = f"{torch.cuda.max_memory_allocated(loop.device) / 2**20:.0f} MiB of GPU memory at peak"
        else:
            memory = f"{peak_resident_mb():.0f} MiB resident at peak"
        table = Table(
            title=f"epoch {loop.position['epoch'] + 1} of {self.epochs}, {images_per_second:.0f} images/s, {memory}, {left:.0f} s left",
            caption_justify="left",
        )
        for name, justify in (("block", "left"), ("loss", "right"), ("accuracy", "right"), ("", "left")):
            table.add_column(name, justify=justify)
        for name, loss, accuracy in zip(self.names, *loop.running(), strict=True):
            table.add_row(name, f"{loss:.3f}", f"{accuracy:.1%}", ProgressBar(total=1.0, completed=accuracy, width=30))
        table.add_section()
        table.add_row("all", "", f"{done / total:.0%}", ProgressBar(total=total, completed=done, width=30))
        return table

    def epoch(self, row):
        if not self.show:
            return
        test = row.get("test vote")
        losses = [value for key, value in row.items() if key.startswith("train loss")]
        accuracies = [value for key, value in row.items() if key.startswith("train accuracy")]
        line = f"epoch {row['epoch']:3d}/{self.epochs}  {row['seconds']:6.1f} s  loss {losses[-1]:.3f}  train {max(accuracies):6.1%}"
        print(line + (f"  test {test:6.1%}" if test is not None else ""), file=sys.stderr, flush=True)
