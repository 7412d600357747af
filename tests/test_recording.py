"""Recorded steps without a GPU: a recorder that keeps the function and calls it again, as a graph launches its kernels again."""

import contextlib
import copy

import pytest
import torch

import fastff
from fastff import SFF, Trainer
from fastff.graph.recording import WARM_UP, CannotRecord, Recorded
from fastff.training import Backprop, recording
from fastff.training.engine import Options, StepResult


class Recorder:
    name, most, warns, changes = "as CUDA graphs", 16, True, 0

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def ready(self):
        return True

    def run(self, function):
        return function()

    def record(self, function, images, target):
        self.recorded += 1

        def replay(images, target):
            self.replayed += 1
            return function(images, target)

        return replay, replay(images, target)


def recorded_steps(engine, recorder, gives_up=False):
    return Recorded(engine.sff, engine.run_step, recorder, engine.segments, gives_up)


def adam(groups):
    return torch.optim.AdamW(groups, lr=1e-3)


@pytest.mark.parametrize("kind", [Trainer, Backprop])
def test_a_recorded_step_is_the_step(kind):
    """Weights, losses and counts, over changing minibatches, two shapes of them, and phases of a greedy schedule."""
    torch.manual_seed(0)
    net = fastff.models.resnet18(5, stem="cifar", width=4)
    sff = SFF(net, 5, input_shape=(3, 16, 16), readout=True, window=1)
    options = {"schedule": "greedy"} if kind is Trainer else {}
    plain, recorded = (kind(copy.deepcopy(sff), adam, **options) for _ in range(2))
    recorder = Recorder()
    plain.run_step = plain.engine.run_step
    recorded.run_step = recorded_steps(recorded.engine, recorder)
    sizes = [4, 4, 3, 4, 4, 4, 3, 3, 3, 4, 4]
    for phase in range(2 if kind is Trainer else 1):
        for trainer in (plain, recorded):
            trainer.engine.phase = phase
            trainer.train_mode()
        for size in sizes:
            images, target = torch.randn(size, 3, 16, 16), torch.randint(5, (size,))
            losses, again = plain.step(images, target), recorded.step(images, target)
            assert torch.equal(losses, again)
            assert torch.equal(plain.correct, recorded.correct)
    phases = 2 if kind is Trainer else 1
    assert recorder.recorded == 2 * phases
    assert recorder.replayed == (len(sizes) - 2 * WARM_UP) * phases
    for (name, a), b in zip(plain.sff.state_dict().items(), recorded.sff.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def an_sff(**options):
    return SFF(fastff.models.resnet18(5, stem="cifar", width=4), 5, input_shape=(3, 16, 16), readout=True, **options)


def as_on_cuda(monkeypatch, trainer, amp=None):
    """What recorded() says of a trainer, as if its network were on a GPU, with a Recorder in place of CUDA's."""
    with monkeypatch.context() as pretended:
        pretended.setattr(recording, "Cuda", lambda device, optimizers: Recorder())
        pretended.setattr(recording, "prepare", lambda engine: None)
        pretended.setattr(trainer.engine, "device", torch.device("cuda"))
        return recording.recorded(trainer.engine, trainer.options, amp)


def test_what_cannot_be_recorded_is_said(monkeypatch):
    for kind in (Trainer, Backprop):
        with pytest.raises(ValueError, match="cuda_graph: expected a network on a CUDA device, got it on cpu"):
            kind(an_sff(), adam, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph: expected True, False or 'auto', got 'always'"):
        Trainer(an_sff(), adam, cuda_graph="always")
    sgd, half = Trainer(an_sff(), lambda groups: torch.optim.SGD(groups, lr=0.1)), Trainer(an_sff(), adam)
    assert "capturable=True" in as_on_cuda(monkeypatch, sgd)
    assert "got SGD" in as_on_cuda(monkeypatch, sgd)
    assert "expected amp None or 'bf16'" in as_on_cuda(monkeypatch, half, torch.float16)
    assert "not recorded: record_steps=False" in repr(Trainer(an_sff(), adam, record_steps=False))
    assert "not recorded: it would gain nothing" in repr(Backprop(an_sff(), adam))
    monkeypatch.setattr(half.engine, "device", torch.device("cuda"))
    assert recording.recorded(half.engine, Options(cuda_graph=False), None) == "cuda_graph=False"
    with pytest.raises(ValueError, match="record_steps: expected a network on a CPU device, got it on cuda"):
        recording.recorded(half.engine, Options(record_steps=True), None)


@pytest.mark.parametrize("kind", [Trainer, Backprop])
def test_steps_are_recorded_without_being_asked(kind, monkeypatch):
    trainer = kind(an_sff(), adam)
    trainer.recorded = trainer.run_step = as_on_cuda(monkeypatch, trainer)
    assert isinstance(trainer.recorded, Recorded)
    batch = torch.randn(4, 3, 16, 16), torch.arange(4)
    trainer.train_mode()
    for _ in range(WARM_UP + 2):
        trainer.run_step(*batch, 0)
    assert trainer.recorded.recorder.recorded == 1
    assert "recorded as CUDA graphs after 3 of a shape (1 so far)" in repr(trainer)
    trainer.sff.blocks[0].eval()  # what Python looks at in a step
    for _ in range(WARM_UP + 1):
        trainer.run_step(*batch, 0)
    assert trainer.recorded.recorder.recorded == 2


def test_python_that_may_change_is_not_recorded_unasked(monkeypatch):
    class Whim(torch.nn.Module):
        def forward(self, x):
            return x if torch.rand(()) < 0.5 else -x

    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), Whim(), torch.nn.Conv2d(8, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5)
    )  # fmt: skip
    trainer = Trainer(SFF(net, 5, "layer", (3, 16, 16)), adam)
    found = as_on_cuda(monkeypatch, trainer)
    assert isinstance(found, str)
    assert "may do something else in each step" in found


def test_a_step_that_fails_to_be_recorded_runs_as_it_is(monkeypatch):
    torch.manual_seed(0)
    sff = an_sff()
    plain, trainer = (Trainer(copy.deepcopy(sff), adam) for _ in range(2))

    class Broken(Recorder):
        def record(self, function, images, target):
            trainer.engine.step.blocks[0].visit((images,), target).backward()
            raise CannotRecord("cuda_graph: a step of this network cannot be recorded")

    trainer.recorded = trainer.run_step = recorded_steps(trainer.engine, Broken(), gives_up=True)
    images, target = torch.randn(4, 3, 16, 16), torch.arange(4)
    for _ in range(WARM_UP):
        assert torch.equal(plain.step(images, target), trainer.step(images, target))
    before = [
        p.detach().clone()
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    with pytest.warns(UserWarning, match="not recorded as CUDA graphs"):
        trainer.step(images, target)
    assert "cannot be recorded" in repr(trainer)
    learned = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert all(p.grad is None for p in learned)
    assert not all(torch.equal(a, b) for a, b in zip(before, learned, strict=True))  # the step was made


def test_recordings_share_memory_and_let_other_threads_be(monkeypatch):
    """Each torch.cuda.graph gets the same pool, and errors of its own thread alone end it."""
    seen = []

    class Graph:
        def replay(self):
            pass

    @contextlib.contextmanager
    def capture(graph, **options):
        seen.append(options)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    recorder = recording.Cuda(torch.device("cuda"), ())
    for _ in range(2):
        recorder.record(lambda images, target: StepResult(images, images, 1), torch.zeros(1), None)
    first, second = seen
    assert first["pool"] is second["pool"]
    assert first["capture_error_mode"] == second["capture_error_mode"] == "thread_local"


def test_a_recording_that_fails_leaves_things_as_they_were(monkeypatch):
    """torch.cuda.graph does not, since the end of a recording in which something failed fails as well: its stream stays the current one, and the
    generator, which is in the midst of a recording, refuses to draw. The first error is the reason."""
    streams = ["ours"]

    class Generator:
        state = "recording"

        def clone_state(self):
            made = Generator()
            made.state = "as before"
            return made

        def graphsafe_set_state(self, generator):
            self.state = generator.state

    generator = Generator()

    class Capture:
        def __init__(self, graph, stream, **options):
            self.stream = stream

        def __enter__(self):
            streams.append(self.stream)

        def __exit__(self, *args):
            raise RuntimeError("operation failed due to a previous error during capture")

    def waits(images, target):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "the recording's")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    with pytest.raises(CannotRecord, match="not permitted when stream is capturing"):
        recording.Cuda(torch.device("cuda", 0), ()).record(waits, torch.zeros(1), None)
    assert streams == ["ours", "the recording's", "ours"]
    assert generator.state == "as before"


def test_plans_that_move_are_not_recorded_for_ever():
    trainer = Trainer(an_sff(), adam)
    step = recorded_steps(trainer.engine, Recorder(), gives_up=True)
    step.recordings = dict.fromkeys(range(recording.Cuda.most))
    trainer.train_mode()
    for _ in range(WARM_UP + 1):
        step(torch.randn(4, 3, 16, 16), torch.arange(4), 0)
    assert step.recorder.recorded == 0


def test_a_rate_that_is_set_by_hand_reaches_the_recorded_step(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    trainer = Trainer(an_sff(), adam)
    recording.prepare(trainer.engine)
    recorder = recording.Cuda(torch.device("cuda"), trainer.optimizers)
    group, rate = recorder.rates[0]
    group["lr"] = 0.25
    assert recorder.ready()
    assert group["lr"] is rate
    assert float(rate) == 0.25


def test_learning_rates_of_recorded_steps_are_tensors():
    from fastff.training import optim

    optimizer = optim.build(adam, [torch.nn.Parameter(torch.zeros(2, 2))])
    rate = optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
    optim.set_progress([optimizer], lambda t: 1 - t, 0.75)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.25e-3)


@pytest.mark.parametrize("optimizer", [adam, None])
def test_a_checkpoint_of_recorded_steps_is_loaded_where_none_are(optimizer, tmp_path):
    """A CUDA graph makes learning rates tensors and Adam capturable, which it refuses to be on a CPU."""
    recorded, plain = (Trainer(an_sff(), optimizer, cuda_graph=False) for _ in range(2))
    batch = torch.randn(4, 3, 16, 16), torch.arange(4)
    recorded.step(*batch)
    rates = [float(group["lr"]) for made in recorded.optimizers for group in made.param_groups]
    torch.set_default_dtype(torch.float64)
    try:
        recording.prepare(recorded.engine)
    finally:
        torch.set_default_dtype(torch.float32)
    groups = [group for made in recorded.optimizers for group in made.param_groups]
    assert all(group["lr"].dtype == torch.float32 for group in groups)  # fused Adam takes no other
    recorded.save(tmp_path / "checkpoint.pt")
    plain.load(tmp_path / "checkpoint.pt")
    groups = [group for made in plain.optimizers for group in made.param_groups]
    assert not any(group["capturable"] or isinstance(group["lr"], torch.Tensor) for group in groups)
    assert [group["lr"] for group in groups] == pytest.approx(rates)
    plain.step(*batch)
