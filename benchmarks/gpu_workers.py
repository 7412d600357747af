"""Runs jobs in processes of their own: one that raises, crashes, hangs or breaks the GPU's context ends alone, and the next job runs all the same."""

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import NamedTuple

import torch


class Job(NamedTuple):
    """One thing to run: rows = function(*arguments), a list of dicts. The function must be importable, and the arguments picklable."""

    name: str
    function: Callable
    arguments: tuple = ()


class Outcome(NamedTuple):
    """What became of a job: its rows; the text of what went wrong, or None; whether there was no time for it; seconds."""

    job: Job
    rows: list
    problem: str | None
    cut: bool
    seconds: float


class Pool:
    """Up to `count` processes, started when they are first needed. With count 0 jobs run in this process.

    Each computes with `threads` threads, and what it prints is appended to the file `log`, if one is given."""

    def __init__(self, count, threads=1, log=None):
        self.count, self.threads, self.log, self.workers = count, threads, log, []

    def run(self, jobs, end):
        """Yield the Outcome of each job as soon as it is known. What has not ended at `end` (time.monotonic) is cut."""
        waiting = list(jobs)
        if not self.count:
            for job in waiting:
                if time.monotonic() > end:
                    yield Outcome(job, [], None, True, 0.0)
                else:
                    start = time.monotonic()
                    yield Outcome(job, *_attempt(job), False, time.monotonic() - start)
            return
        busy = {}  # {connection: (worker, job, start)}
        while waiting or busy:
            while waiting and len(busy) < self.count and time.monotonic() < end:
                worker = self._idle(busy)
                worker.connection.send(waiting[0])
                busy[worker.connection] = worker, waiting.pop(0), time.monotonic()
            for connection in wait(list(busy), max(0.0, end - time.monotonic())):
                worker, job, start = busy.pop(connection)
                yield Outcome(job, *worker.result(), False, time.monotonic() - start)
            if time.monotonic() >= end:
                for worker, job, start in busy.values():
                    worker.kill()
                    yield Outcome(job, [], None, True, time.monotonic() - start)
                yield from (Outcome(job, [], None, True, 0.0) for job in waiting)
                return

    def _idle(self, busy):
        self.workers = [worker for worker in self.workers if worker.process.is_alive()]
        found = next((worker for worker in self.workers if worker.connection not in busy), None)
        if found is None:
            found = _Worker(self.threads, self.log)
            self.workers.append(found)
        return found

    def close(self):
        """End the processes."""
        for worker in self.workers:
            worker.kill()
        self.workers = []


class _Worker:
    def __init__(self, threads, log):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, threads, log), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process ends the connection

    def result(self):
        """Return (rows, problem) of the job that was sent."""
        try:
            rows, problem, usable = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return [], f"the process ended with exit code {self.process.exitcode}"
        if not usable:
            self.kill()
        return rows, problem

    def kill(self):
        self.process.kill()
        self.process.join()


def _serve(connection, threads, log):
    if log is not None:
        with open(log, "a") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(threads)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        rows, problem = _attempt(job)
        connection.send((rows, problem, _usable()))


def _attempt(job):
    try:
        return job.function(*job.arguments), None
    except (Exception, SystemExit):
        lines = traceback.format_exc().strip().splitlines()
        return [], "\n".join([lines[-1][:2000], *lines[-12:-1]])


def _usable():
    """Free what a job left. Returns whether the GPU still takes work from this process: after a fault in a kernel it refuses all."""
    gc.collect()
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
