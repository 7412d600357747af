"""Who failed. When a rank dies or hangs, the others see broken connections and timeouts that name neither it nor the reason. So every rank beats in
torch.distributed's store: a process that was killed or stopped is silent there, one that is stuck in its own work beats but does not wait.
"""

import atexit
import contextlib
import os
import re
import signal
import threading
import time

import torch.distributed as dist

PERIOD = 0.5  # seconds between beats
PATIENCE = 3.0  # seconds of listening before a silent rank is called dead
NOISE = re.compile(r"^\[[^]]*\] |\. This is typically.*$")  # around gloo's messages


class RankFailed(RuntimeError):
    """Another rank ended, hangs, or met an error. Attribute `reason`; the text says where training stands too."""

    def __init__(self, reason, step=None, path=None):
        self.reason = reason
        at = "" if step is None else f"; training ended at step {step}"
        kept = f"; the last checkpoint {path} is intact, --resume {path.parent} goes on from it" if path else ""
        super().__init__(reason + at + kept)


class Watch:
    """Beats for this rank, and explains failures of others. Watch() does nothing."""

    def __init__(self, rank=0, size=1):
        self.rank, self.size, self.steps, self.waiting = rank, size, 0, False
        self.store = None
        if size > 1:
            store = dist.distributed_c10d._get_default_store()
            self.store, beats = _connection(store), _connection(store)
            ended = threading.Event()
            thread = threading.Thread(target=self._beat, args=(beats, ended), name="fastff-watch", daemon=True)
            thread.start()
            atexit.register(
                lambda: (ended.set(), thread.join(PATIENCE))
            )  # a call into the store must not outlive the interpreter

    def _beat(self, store, ended):
        count = 0
        with contextlib.suppress(RuntimeError):  # the store is gone: so is the run
            while not ended.wait(PERIOD):
                count += 1
                store.set(f"fastff/beat/{self.rank}", f"{count} {self.steps} {int(self.waiting)}")

    @contextlib.contextmanager
    def guard(self):
        """Around every wait for other ranks: errors become RankFailed."""
        self.waiting = True
        try:
            yield
        except RankFailed:
            raise
        except RuntimeError as error:
            raise RankFailed(self.explain(str(error).splitlines()[0])) from error
        finally:
            self.waiting = False

    def report(self, reason):
        """Tell the others why this rank ends; the first reason counts."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.compare_set("fastff/failure", "", f"rank {self.rank} of {self.size}: {reason}")

    def explain(self, error):
        """Why a wait for others failed, in one line. Listens for PATIENCE seconds."""
        error = NOISE.sub("", error)
        if self.store is None:
            return error
        found = _asked(self._listen)
        if found is None:
            return f"rank 0 of {self.size}, or what started it, ended or hangs: its store does not answer ({error})"
        return found if found.startswith("rank ") and ": " in found else f"{found} ({error})"

    def _listen(self):
        """What a rank reported, or who is silent, or who does not wait."""
        reported = lambda: self.store.check(["fastff/failure"])  # noqa: E731
        before = None if reported() else self._heard()
        if before is not None:
            time.sleep(PATIENCE)
        if reported():
            return self.store.get("fastff/failure").decode()
        now = self._heard()
        silent = [rank for rank in range(self.size) if now[rank] == before[rank]]
        if silent:
            return f"{_named(silent, self.size)} ended or hangs, nothing was heard of it for {PATIENCE:g} s"
        busy = [rank for rank, beat in enumerate(now) if rank != self.rank and beat[2] == "0"]
        return f"{_named(busy, self.size)} did not come in time" if busy else "the ranks wait for each other"

    def _heard(self):
        keys = [f"fastff/beat/{rank}" for rank in range(self.size)]
        return [self.store.get(key).decode().split() if self.store.check([key]) else ["0", "0", "0"] for key in keys]

    def on_terminate(self):
        """SIGTERM, which torchrun sends when another rank failed, raises RankFailed with the reason."""

        def handler(number, frame):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise RankFailed(self.explain("terminated"))

        if self.store is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def speaks():
    """Whether this process is the one of all ranks that prints why they end: the first that asks."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    rank, store = str(dist.get_rank()), dist.distributed_c10d._get_default_store()
    answer = _asked(lambda: _connection(store).compare_set("fastff/speaks", "", rank).decode())
    if rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        time.sleep(PATIENCE)  # the store ends with this process, and others still ask
    return answer in (rank, None)


def _asked(question):
    """question() of the store, None where it does not answer: its host may be what failed, and then it blocks."""
    answers = []

    def ask():
        with contextlib.suppress(RuntimeError):
            answers.append(question())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(3 * PATIENCE)
    return answers[0] if answers else None


def _connection(store):
    """A connection of its own to the store: one that waits blocks the others on the same."""
    return store.clone() if hasattr(store, "clone") else store


def _named(ranks, size):
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {size}"
