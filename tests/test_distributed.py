"""Several ranks against one process, over gloo: weights, history, checkpoints at other numbers of ranks, ranks that die or hang, the command line."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from collections import deque
from pathlib import Path

import pytest
import torch

from fastff import Distributed, Trainer
from fastff.parallel import link
from fastff.parallel.placement import balanced
from fastff.parallel.watch import RankFailed, Watch
from fastff.training.checkpoint import load
from fastff.training.loader import Augment, Loader

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
TRAIN = ["-m", "fastff.cli", "train", "--data", "digits"]


def environment():
    """Without what a launcher of these tests may have set."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("TORCHELASTIC", "MASTER_")) and k not in ("RANK", "WORLD_SIZE")
    }
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}


def launched(*command, timeout=300, **options):
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=timeout, env=environment(), **options
    )


@pytest.mark.slow
@pytest.mark.skipif(not (TESTS.parent / "benchmarks").exists(), reason="counts bytes with benchmarks/")
@pytest.mark.parametrize("ranks", [2, 4])
def test_equal_to_one_process(ranks, tmp_path):
    """Ranks that share the blocks to the last bit, ranks that share minibatches (batch norm synchronised) to rounding in float64."""
    ended = launched(*TORCHRUN, ranks, "--standalone", TESTS / "distributed_driver.py", tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["blocks"] == dict.fromkeys(found["blocks"], 0.0)
    for case, difference in found["data"].items():
        assert difference < 1e-10, case
    for case, fit in found["fit"].items():
        assert fit["difference"] < 1e-10 and fit["history"] < 1e-10 and fit["epochs"] == 3, case
    for case, sent in found["bytes"].items():
        total, least = map(sum, zip(*sent, strict=True))  # a ring's parts are of unequal sizes, not so their sum
        assert least - len(sent) <= total, (case, sent)
        for counted, predicted in sent:  # beside them what ranks tell each other: beats, agreements
            assert counted <= 1.02 * predicted + 3000, (case, sent)
    whole, parts = zip(*found["state"], strict=True)
    assert len(set(whole)) == 1 and sum(parts) == whole[0] and max(parts) < 1.05 * whole[0] / ranks
    assert found["local"] and found["sampler"]
    assert found["messages"] == 1
    named = {
        "divisor": "block_ranks", "placement": "placement", "window": "distributed", "greedy": "distributed", "pairs": "distributed",
        "finish": "finish", "clip": "shard_optimizer", "network": "sff", "loader": "loader", "share": "loader",
    }  # fmt: skip
    for case, argument in named.items():
        assert found["refused"][case].startswith(f"{argument}: expected "), case


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kills", "how"),
    [("block", 10, "SIGKILL"), ("data", 4, "SIGKILL"), ("data", 1, "SIGSTOP"), ("block", 1, "SIGSTOP")],
)
def test_ranks_that_die(kind, kills, how, tmp_path, monkeypatch):
    """Each time all ranks end with one message and leave no file behind, the checkpoint of the step before is intact, and other numbers of ranks go
    on to the same bits."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ended = launched(sys.executable, TESTS / "kill_driver.py", tmp_path / "runs", kind, kills, how)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["killed"] == kills and len(found["statuses"]) == kills
    assert all(status == 1 for attempt in found["statuses"] for status in attempt), found["statuses"]
    assert set(found["reports"]) <= {0, 1}  # none where the ranks had not come together yet
    assert sum(found["reports"]) >= kills / 2
    assert not list(tmp_path.glob("fastff-*"))
    assert all(re.match(r"ranks? \d", line) and "ended or hangs" in line for line in found["told"])
    # A checkpoint is written after every step. Rank 0 may die while it writes one, and the other rank has counted its next step by then.
    assert max(found["lost"]) <= 2
    assert max(found["positions"]) > 0 or kills == 1
    assert found["longest"] < 40
    assert found["same"] == [True] * found["runs"]


def finish(process, timeout=240):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def run_until_checkpoint(command, out):
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    limit = time.monotonic() + 120
    while not (out / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < limit
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return process, list(map(int, workers))


@pytest.mark.slow
def test_command_line(tmp_path):
    """torchrun with two processes reaches the accuracy of one; a killed process ends the run with one line; fewer ranks go on; so does a restart."""
    digits = [*TRAIN, "--epochs", 6, "--subset", 1000]
    accuracy = {}
    for name, command in {"one": [sys.executable], "two": [*TORCHRUN, 2]}.items():
        ended = launched(*command, *digits, "--out", tmp_path / name)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert len(re.findall("all: their vote", ended.stdout)) == 1 and ended.stderr.count("epoch   6/6") == 1
        accuracy[name] = load(tmp_path / name / "checkpoint.pt")["history"][-1]["test vote"]
    assert min(accuracy.values()) > 0.95 and abs(accuracy["one"] - accuracy["two"]) < 0.02

    out = tmp_path / "killed"
    process, workers = run_until_checkpoint(
        [*TORCHRUN, 2, *TRAIN, "--epochs", 200, "--block-ranks", 2, "--out", out], out
    )
    os.kill(workers[-1], signal.SIGKILL)
    code, output = finish(process)
    told = [line for line in output.splitlines() if line.startswith("fastff: ")]
    assert code == 1 and len(told) == 1, output[-3000:]
    assert re.match(
        r"fastff: rank 1 of 2 ended or hangs, .*checkpoint.pt is intact, --resume .* goes on from it", told[0]
    )
    epochs = load(out / "checkpoint.pt")["position"]["epoch"] + 1
    resume = ["-m", "fastff.cli", "train", "--resume", out, "--epochs", epochs]
    ended = launched(sys.executable, *resume)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len(load(out / "checkpoint.pt")["history"]) == epochs

    out = tmp_path / "restarted"
    options = ["--epochs", 30, "--subset", 300, "--shard-optimizer", "--out", out]
    process, workers = run_until_checkpoint([*TORCHRUN, 2, "--max-restarts", 1, *TRAIN, *options], out)
    before = load(out / "checkpoint.pt")["position"]["epoch"]
    os.kill(workers[0], signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output[-3000:]
    assert before < 30 and len(load(out / "checkpoint.pt")["history"]) == 30
    assert output.count("epoch   1/30") == 1  # not from the beginning


@pytest.mark.slow
def test_rank_0_dies_without_torchrun(tmp_path):
    """The store ends with it; the others end with one line all the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "3"}
    command = list(map(str, [sys.executable, *TRAIN, "--epochs", 200, "--subset", 300, "--out", tmp_path]))
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(command, env=environment() | address | {"RANK": str(rank)}, **options) for rank in range(3)
    ]
    limit = time.monotonic() + 120
    while not (tmp_path / "checkpoint.pt").exists():
        assert time.monotonic() < limit and all(process.poll() is None for process in started)
        time.sleep(0.05)
    os.kill(started[0].pid, signal.SIGKILL)
    ended = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [-signal.SIGKILL, 1, 1]
    told = [line for text in ended for line in text.splitlines() if line.startswith("fastff: ")]
    assert len(told) == 1, ended
    assert re.match(r"fastff: rank 0 of 3, or what started it, ended .*--resume .* goes on from it", told[0])


def test_placement():
    assert balanced([3, 1, 1, 1, 1, 1], 2) == [2, 4]
    assert balanced([1, 1, 1], 3) == [1, 1, 1]
    assert balanced([5, 1, 1, 5], 3) in ([1, 2, 1],)
    assert balanced([1.0] * 9, 1) == [9]
    with pytest.raises(ValueError, match="block_ranks: expected at most 2"):
        balanced([1, 1], 3)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_of_a_loader(count):
    """Together the shares are the whole minibatches, augmented the same, at every position."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (37, 3, 6, 6), generator=generator, dtype=torch.uint8)
    whole = Loader(images, torch.arange(37), 8, mean=[0.5] * 3, std=[0.2] * 3, augment=Augment(1, True), shuffle=True)
    shares = [whole.shared(rank, count) for rank in range(count)]
    for epoch in (0, 3):
        for loader in (whole, *shares):
            loader.set_epoch(epoch)
        for batch, parts in zip(whole.iter_from(1), zip(*(s.iter_from(1) for s in shares), strict=True), strict=True):
            assert torch.equal(batch[0], torch.cat([part[0] for part in parts]))
            assert torch.equal(batch[1], torch.cat([part[1] for part in parts]))
            sizes = [len(part[1]) for part in parts]
            assert max(sizes) - min(sizes) <= 1
    assert [s.least for s in shares] == [5 // count] * count
    with pytest.raises(ValueError, match="rank: expected 0 to 2, got 3"):
        whole.shared(3, 3)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"block_ranks": 0}, "block_ranks: expected a whole number of at least 1, got 0"),
        ({"block_ranks": True}, "block_ranks: expected a whole number of at least 1, got True"),
        ({"batch_norm": "sync"}, "batch_norm: expected one of local, synchronized, got 'sync'"),
        ({"timeout": 0}, "timeout: expected a finite number above 0, got 0"),
        ({"timeout": float("inf")}, "timeout: expected a finite number above 0, got inf"),
        ({"timeout": "5 min"}, "timeout: expected a finite number above 0, got '5 min'"),
    ],
)
def test_bad_settings(given, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        Distributed(**given)


def test_without_a_launcher(monkeypatch):
    from training_oracle import made

    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError, match="distributed: expected torch.distributed to run: start the script with torchrun"
    ):
        Trainer(made(), distributed="data")
    with pytest.raises(
        ValueError, match="distributed: expected 'data', 'block', a DeviceMesh or fastff.Distributed, got 2"
    ):
        Trainer(made(), distributed=2)
    with pytest.raises(ValueError, match="cuda_graph: expected False with distributed"):
        Trainer(made(), distributed="data", cuda_graph=True)


def test_an_error_that_says_nothing_is_named():
    with pytest.raises(RankFailed, match="^RuntimeError$"), Watch().guard():
        raise RuntimeError


def test_messages_bring_what_was_sent(monkeypatch):
    """Values of every kind, and memory formats, over a wire of queues; the second part is larger than the first, the third smaller."""
    wires = {"control": deque(), "messages": deque()}
    calls = types.SimpleNamespace(
        isend=lambda t, to, group: wires[group].append(t.clone()) or types.SimpleNamespace(wait=lambda: None),
        irecv=lambda t, source, group: types.SimpleNamespace(wait=lambda: t.copy_(wires[group].popleft())),
    )
    monkeypatch.setattr(link, "dist", calls)
    sender, receiver = (link.Link.__new__(link.Link) for _ in range(2))
    for end in (sender, receiver):
        end.ranks = types.SimpleNamespace(rank=0, watch=Watch(), control="control", messages="messages")
        end.device, end.previous, end.next, end.capacity = "cpu", 0, 1, link.ALIGN
        end.in_flight, end.posted = [], None
    images = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    mask, values = torch.rand(4, 1) < 0.5, (torch.Size([4, 3]), (2, 1.5), None, True)
    sent = [
        link.Part((images[:n], images[:n, :1].expand(-1, 3, -1, -1), mask[:n], *values), torch.arange(n), n / 9, 9)
        for n in (3, 4, 2)
    ]
    for part in sent:
        sender.send(part, len(sent))
    for part, (got, count) in zip(sent, receiver.minibatch(), strict=True):
        assert count == 3 and got.alive[3:] == values and list(map(type, got.alive[3:])) == list(map(type, values))
        assert (got.share, got.samples) == (part.share, part.samples) and torch.equal(got.target, part.target)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got.alive[:3], part.alive[:3], strict=True))
        assert got.alive[0].stride() == part.alive[0].stride()
    with pytest.raises(ValueError, match="sff: 2000 tensors are alive behind the last block of rank 0, more than"):
        sender.send(sent[0]._replace(alive=(mask,) * 2000), 1)
