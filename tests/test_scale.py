"""The model of scale (benchmarks/scale_model.py) against cases that can be worked out by hand, and its byte counts against what they count."""

import dataclasses
import math
import random
import socket
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import tables, torch_distributed
from benchmarks.scale_model import (
    ADAM_STATES,
    Block,
    Blocks,
    Machine,
    Tasks,
    balanced,
    block_ranges,
    bytes_per_step,
    message_bytes,
    one_forward_one_backward,
    plan,
    predict,
    predictions,
)
from benchmarks.scale_processes import tcp_bytes_sent
from fastff.parallel import link

FREE = Machine(math.inf, 0.0)


def drawn(seed, count=9):
    """Blocks as different as those of networks are."""
    draw = random.Random(seed)
    second, size = lambda: draw.uniform(0.001, 0.1), lambda: draw.uniform(1e3, 3e7)
    return [Block(second(), second(), second(), size(), size(), size()) for _ in range(count)]


EQUAL = [Block(1.0, 2.0, 0.0, 1000.0, 4000.0)] * 8


@pytest.mark.parametrize("kind", ["sff", "backprop"])
def test_one_device(kind):
    """The sum of what its blocks take; nothing is sent."""
    blocks = drawn(0)
    found = predict(plan(kind, 1, 1, 32), blocks, Machine(1e6, 1.0))
    assert found.seconds == pytest.approx(sum(b.seconds for b in blocks))
    assert found.sent_bytes == 0
    weights = sum(b.gradient_bytes for b in blocks)
    kept = [b.memory_bytes for b in blocks]
    assert found.memory_bytes == pytest.approx(
        (1 + ADAM_STATES) * weights + (max(kept) if kind == "sff" else weights + sum(kept))
    )


@pytest.mark.parametrize("kind", ["sff", "backprop"])
@pytest.mark.parametrize("ranks", [2, 4, 1024])
def test_data_parallel_over_free_links(kind, ranks):
    blocks = drawn(1)
    assert predict(plan(kind, ranks, 1, 32), blocks, FREE).seconds == pytest.approx(sum(b.seconds for b in blocks))


@pytest.mark.parametrize("seed", range(20))
def test_data_parallel_sff(seed):
    """A step takes as long as the computation, all reductions, or one block with its reduction, whichever is longest."""
    blocks, ranks = drawn(seed), 2 ** random.Random(seed).randint(1, 6)
    machine = Machine(10 ** random.Random(seed).uniform(7, 10), 1e-3, random.Random(seed).choice(["ring", "tree"]))
    reduced = [machine.reduce_seconds(b.gradient_bytes + 4, ranks) for b in blocks]
    alone = max(b.seconds + r for b, r in zip(blocks, reduced, strict=True))
    found = predict(plan("sff", ranks, 1, 32), blocks, machine)
    assert found.seconds == pytest.approx(max(sum(b.seconds for b in blocks), sum(reduced), alone), rel=0.02)
    # so without latency it never takes longer than DDP, which waits for the end of each step
    ddp = predict(plan("backprop", ranks, 1, 32), blocks, dataclasses.replace(machine, latency=0.0))
    sff = predict(plan("sff", ranks, 1, 32), blocks, dataclasses.replace(machine, latency=0.0))
    assert sff.seconds <= ddp.seconds * 1.001


def test_ddp_without_overlap():
    """One block: its buckets can only be sent once its backward pass is over, and the update waits for them."""
    block = Block(1.0, 2.0, 0.5, 0.0, 30e6)
    machine = Machine(1e7, 0.01, "ring")
    reduced = 2 * 3 / 4 * 30e6 / 1e7 + 3 * 6 * 0.01  # buckets of 1 MiB, 25 MiB and the rest
    assert predict(plan("backprop", 4, 1, 32), [block], machine).seconds == pytest.approx(3.5 + reduced)


@pytest.mark.parametrize("stages", [2, 3, 4, 9])
def test_block_parallel_over_free_links(stages):
    """As fast as the slowest rank, wherever it is: no flush, no bubble."""
    blocks = drawn(stages)
    how = plan("sff", 1, stages, 32 * stages)
    assert (how.parts, how.images) == (stages, 32)
    placement = balanced([b.seconds for b in blocks], stages)
    slowest = max(
        sum(stages * (blocks[j].forward + blocks[j].backward) + blocks[j].update for j in own)
        for own in block_ranges(placement)
    )
    assert predict(how, blocks, FREE, placement).seconds == pytest.approx(slowest, rel=0.02)


def test_block_parallel_bound_by_its_link():
    how = plan("sff", 1, 2, 2)
    blocks = [Block(1e-6, 1e-6, 0.0, 1e6, 100.0)] * 2
    machine = Machine(1e6, 0.1)
    per_message = 0.1 + message_bytes(blocks[0], how.images) / 1e6
    assert predict(how, blocks, machine).seconds == pytest.approx(2 * per_message, rel=0.01)


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 4, 32])
def test_bubble_of_1f1b(stages, micro_batches):
    how = plan("backprop", 1, stages, 8)._replace(parts=micro_batches)
    per_stage = 3.0 * 8 / stages
    found = predict(how, EQUAL, FREE)
    assert found.seconds == pytest.approx((micro_batches + stages - 1) * per_stage)


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_order_of_1f1b(stages, count):
    """Every micro-batch once forward and once backward, in order, and no more of them in flight than stages follow."""
    for stage in range(stages):
        order = one_forward_one_backward(stage, stages, count)
        assert [i for kind, i in order if kind == "F"] == [i for kind, i in order if kind == "B"] == list(range(count))
        flying = most = 0
        for kind, _ in order:
            flying += 1 if kind == "F" else -1
            most = max(most, flying)
        assert flying == 0 and most == min(count, stages - stage)


def test_bytes():
    blocks, placement = [Block(1.0, 1.0, 1.0, 1000.0, 400.0)] * 4, [1, 2, 1]
    one = math.ceil(8 * 10 / 256) * 256 + 1024 + 8192
    assert message_bytes(blocks[0], 10) == one
    how = plan("sff", 5, 3, 30)
    reduced = 2 * 4 / 5 * 404
    assert bytes_per_step(how, blocks, placement) == pytest.approx([3 * one + reduced, 3 * one + 2 * reduced, reduced])
    how = plan("backprop", 5, 3, 36)
    assert how.parts == 12
    reduced = 2 * 4 / 5 * 400
    assert bytes_per_step(how, blocks, placement) == pytest.approx(
        [12_000 + reduced, 24_000 + 2 * reduced, 12_000 + reduced]
    )


def test_message_is_the_links():
    """The size of what fastff.parallel.link sends for one tensor and its labels."""
    tensor, target = torch.zeros(7, 5, 3, 3), torch.zeros(7, dtype=torch.int64)
    block = Block(0.0, 0.0, 0.0, tensor.numel() * 4, 0.0)
    assert message_bytes(block, 7) == link.HEADER + sum(link._room(t) for t in (target, tensor))


def test_cores_are_shared():
    """Replicas without traffic between them on fewer cores: all as much slower; a pipeline whose ranks take turns loses nothing."""
    blocks = drawn(3)
    found = predict(plan("sff", 6, 1, 32), blocks, dataclasses.replace(FREE, cores=2))
    assert found.seconds == pytest.approx(3 * sum(b.seconds for b in blocks))
    how = plan("sff", 1, 4, 128)
    free, shared = (predict(how, EQUAL, dataclasses.replace(FREE, cores=n)).seconds for n in (4, 1))
    assert shared == pytest.approx(4 * free, rel=0.01)


def test_slower_links_take_longer():
    for kind in ("sff", "backprop"):
        for data, stages in ((4, 1), (1, 4), (4, 4)):
            how = plan(kind, data, stages, 64)
            seconds = [predict(how, drawn(4), Machine(rate, 1e-4)).seconds for rate in (1e10, 1e9, 1e8, 1e7)]
            assert seconds == sorted(seconds) and seconds[-1] > 2 * seconds[0]


def test_waiting_gradients_are_counted():
    """Over a slow link all gradients wait at once; over a free one at most one block's."""
    blocks = [dataclasses.replace(b, memory_bytes=0.0) for b in EQUAL]
    slow, fast = (predict(plan("sff", 2, 1, 4), blocks, Machine(rate, 0.0)).memory_bytes for rate in (1.0, math.inf))
    assert fast <= (3 * 8 + 1) * 4000 and slow >= (3 * 8 + 7) * 4000


def test_between_measured_batches():
    small, large = ([Block(1.0, 1.0, 1.0, 100.0, 9.0, 50.0)], [Block(2.5, 8.0, 1.0, 400.0, 9.0, 150.0)])
    blocks = Blocks((8, small), (32, large))
    assert dataclasses.astuple(blocks.at(8)[0]) == pytest.approx((1.0, 2.0, 1.0, 100.0, 9.0, 50 + 2 / 3, 0.0), rel=0.02)
    assert dataclasses.astuple(blocks.at(32)[0]) == pytest.approx((2.5, 8.0, 1.0, 400.0, 9.0, 150.0, 0.0))
    assert blocks.at(0)[0].forward == pytest.approx(0.5)  # what does not grow with the images
    assert blocks.at(0)[0].backward == 0  # more than twice as long for twice as many: no such part
    assert blocks.at(32, faster=10)[0].seconds == pytest.approx(1.15)


def test_a_thousand_devices():
    """All six methods, every split; each method's best is at least as good as its special cases."""
    measured = {kind: Blocks((8, drawn(5, 17)), (32, drawn(6, 17))) for kind in ("sff", "backprop")}
    found = predictions(measured, Machine(1e9, 1e-5), 1024, 32)
    assert set(found) == {"SFF, data", "SFF, 2-D", "backprop, DDP", "backprop, 2-D"}  # there are not 1024 blocks
    for how, _ in found.values():
        assert how.data * how.stages == 1024
    few = predictions(measured, Machine(1e9, 1e-5), 8, 32)
    assert len(few) == 6
    for kind in ("SFF", "backprop"):
        best = next(found.seconds for name, (_, found) in few.items() if name == f"{kind}, 2-D")
        assert all(best <= found.seconds for name, (_, found) in few.items() if name.startswith(kind))


def test_waiting_for_each_other():
    tasks = Tasks()
    tasks.compute(0, "a", 1.0, ["b"])
    tasks.compute(1, "b", 1.0, ["a"])
    with pytest.raises(RuntimeError, match="wait for each other"):
        tasks.run()


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO is Linux's")
def test_tcp_bytes_sent():
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
        with here, there:
            before = tcp_bytes_sent()
            here.sendall(bytes(100_000))
            left = 100_000
            while left:
                left -= len(there.recv(left))
            deadline = time.monotonic() + 5
            while (sent := tcp_bytes_sent() - before) < 100_000 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert sent == 100_000


@pytest.mark.slow
def test_beside_torch_distributed(tmp_path, monkeypatch):
    """The classes of torch.distributed train to the same weights in two processes, and the table has a row for each."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.torch_distributed",
        "--rounds",
        "1",
        "--csv",
        tmp_path / "torch-distributed.csv",
    ]
    ended = subprocess.run(list(map(str, command)), cwd=tables.ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = torch_distributed.table().splitlines()[2:]
    assert sum(row.startswith("| `") for row in rows) == len(torch_distributed.COMPARED)
    assert sum("refused" in row for row in rows) == 1
