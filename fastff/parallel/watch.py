"""Failure detection. When a rank dies or hangs, the other ranks see broken connections and timeouts, which name neither that rank nor the reason.
Therefore every rank writes heartbeats to torch.distributed's store. A process that was killed or stopped writes none; a process that is stuck in its
own work still writes them, and they say that it does not wait for others.
"""

import atexit
import contextlib
import os
import re
import signal
import tempfile
import threading
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from fastff.arguments import first_line

PERIOD = 0.5  # seconds between two heartbeats
PATIENCE = 3.0  # seconds without a heartbeat after which a rank counts as dead
_report: int | None = None  # a file that the processes of a run on this machine share
NOISE = re.compile(r"^\[[^]]*\] |\. This is typically.*$")  # what gloo adds before and after its messages


class RankFailed(RuntimeError):
    """Raised when another rank has ended, hangs, or has met an error.

    Args:
        reason: what happened, in one line; also an attribute.
        step: step at which training ended, or None.
        path: Path of the last checkpoint, or None."""

    def __init__(self, reason, step=None, path=None):
        self.reason = reason
        at = "" if step is None else f"; training ended at step {step}"
        kept = f"; the last checkpoint {path} is intact, --resume {path.parent} goes on from it" if path else ""
        super().__init__(reason + at + kept)


class Watch:
    """Writes the heartbeats of this rank, and explains failures of other ranks. Watch() of a single process does nothing."""

    def __init__(self, rank=0, size=1):
        self.rank, self.size, self.waiting = rank, size, False
        self.store = None
        if size > 1:
            store = dist.distributed_c10d._get_default_store()
            # A connection for each thread: a call that waits blocks all other calls on the same one.
            self.store, own, ended = store.clone(), store.clone(), threading.Event()
            thread = threading.Thread(target=self._send_heartbeats, args=(own, ended), name="fastff-watch", daemon=True)
            thread.start()
            # The thread must not be in a call to the store when the interpreter ends.
            atexit.register(lambda: (ended.set(), thread.join(PATIENCE)))

    def _send_heartbeats(self, store, ended):
        count = 0
        with contextlib.suppress(RuntimeError):  # raised when the store has ended, and the run with it
            while not ended.wait(PERIOD):
                count += 1
                store.set(f"fastff/heartbeat/{self.rank}", f"{count} {int(self.waiting)}")

    @contextlib.contextmanager
    def guard(self):
        """Context manager for every wait for other ranks. It turns a RuntimeError of torch.distributed into RankFailed."""
        self.waiting = True
        try:
            yield
        except RankFailed:
            raise
        except RuntimeError as error:
            raise RankFailed(self.explain(first_line(error))) from error
        finally:
            self.waiting = False

    def wait(self, works):
        """Wait for these calls of torch.distributed, as `guard` does."""
        with self.guard():
            for work in works:
                work.wait()

    def report(self, reason):
        """Tell the other ranks in one line why this rank ends. Only the first report of all ranks is kept."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.compare_set("fastff/failure", "", f"rank {self.rank} of {self.size}: {reason}")

    def explain(self, error):
        """Return one line that says why a wait for other ranks failed. `error` is the line that torch.distributed gave.

        Takes PATIENCE seconds, in which it compares heartbeats."""
        error = NOISE.sub("", error)
        if self.store is None:
            return error
        silence = f"rank 0 of {self.size}, or what started it, ended or hangs: its store does not answer"
        return _ask_store(lambda: self._find_failure(error)) or f"{silence} ({error})"

    def _find_failure(self, error):
        """Return what a rank reported, else which ranks send no heartbeat, else which ranks do not wait for others."""
        before = self._heartbeats()
        if not self.store.check(["fastff/failure"]):
            time.sleep(PATIENCE)
        if self.store.check(["fastff/failure"]):
            return self.store.get("fastff/failure").decode()
        now = self._heartbeats()
        silent = [rank for rank in range(self.size) if now[rank] == before[rank]]
        busy = [rank for rank, (_, waits) in enumerate(now) if rank != self.rank and waits == "0"]
        found = f"{_rank_names(busy, self.size)} did not come in time" if busy else "the ranks wait for each other"
        if silent:
            found = f"{_rank_names(silent, self.size)} ended or hangs, nothing was heard of it for {PATIENCE:g} s"
        return f"{found} ({error})"

    def _heartbeats(self):
        """[(count, waits)] of all ranks, as strings."""
        keys = [f"fastff/heartbeat/{rank}" for rank in range(self.size)]
        return [self.store.get(key).decode().split() if self.store.check([key]) else ["0", "0"] for key in keys]

    def on_terminate(self):
        """Make SIGTERM, which torchrun sends when another rank has failed, raise RankFailed with the reason."""

        def handler(number, frame):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise RankFailed(self.explain("terminated"))

        if self.store is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def open_report(store, rank, size):
    """Open an empty file that all processes of a run share on this machine, and remove its name when all have it, so that nothing is left of it."""
    global _report
    name = store.compare_set("fastff/run", "", uuid.uuid4().hex).decode()  # the same on all ranks, and no other run's
    path = Path(tempfile.gettempdir()) / f"fastff-{name}"
    with contextlib.suppress(OSError):  # where no file can be made, rank 0 alone prints
        _report = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    store.set(f"fastff/opened/{rank}", "")
    try:
        store.wait([f"fastff/opened/{other}" for other in range(size)])
    finally:
        # Another process has done it; or this is Windows, which removes no open file.
        with contextlib.suppress(OSError):
            path.unlink()


def prints_failure():
    """Return True in one process of each machine, the first that calls this; that process prints why the run ended.

    The shared file decides it, and not the store, which may have ended with rank 0."""
    if _report is None or not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    os.write(_report, b"1")
    return os.lseek(_report, 0, os.SEEK_CUR) == 1  # behind the byte that was just appended


def _ask_store(question):
    """Return question(), a call to the store, or None if it takes too long: it blocks if the process that hosts the store has failed."""
    answers = []

    def ask():
        with contextlib.suppress(RuntimeError):
            answers.append(question())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(3 * PATIENCE)
    return answers[0] if answers else None


def _rank_names(ranks, size):
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {size}"
