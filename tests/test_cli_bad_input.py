"""What the command line says to bad input: one line, exit code 2, nothing lost."""

import os
import shutil

import pytest
import torch

for package in ("typer", "rich", "sklearn", "matplotlib", "PIL"):
    pytest.importorskip(package)

from command_line import TINY, call, refused, state  # noqa: E402

# --- bad input

WRONG = {
    "unknown data": (["--data", "digit"], "data: expected one of digits, mnist"),
    "missing root": (["--data", "mnist", "--root", "nowhere"], "no such folder (root)"),
    "empty root": (["--data", "cifar10", "--root", "."], "no such file or folder"),
    "folder without classes": (["--data", "."], "expected at least two folders, one for each class"),
    "unknown model": (["--model", "resnet19"], "model: expected one of resnet18"),
    "no epochs": (["--epochs", "0"], "epochs: expected a whole number of at least 1, got 0"),
    "batch of one": (["--batch-size", "1"], "batch_size: expected a whole number of at least 2, got 1"),
    "no width": (["--width", "-4"], "width: expected a whole number of at least 1, got -4"),
    "negative learning rate": (["--lr", "-1"], "lr: expected a finite number above 0, got -1.0"),
    "nan learning rate": (["--lr", "nan"], "lr: expected a finite number above 0, got nan"),
    "negative weight decay": (["--weight-decay", "-1"], "weight_decay: expected a finite number of at least 0"),
    "huge subset": (["--subset", "100000"], "subset: expected a whole number from 10"),
    "image size of digits": (["--image-size", "16"], "image_size: expected none with digits"),
    "no window": (["--window", "0"], "window: expected a whole number of at least 1"),
    "device": (["--device", "tpu9"], "device: expected one that works here"),
    "device without data": (["--device", "meta"], "device: expected one that holds data"),
    "out is a file": (["--out", "file"], "out: expected a folder that can be written"),
}
WRONG_TRAIN = {
    "granularity": (["--granularity", "blok"], "granularity: expected one of layer, block, stage, model or a list"),
    "module path": (["--granularity", "layer1.0,layer2.9"], "close to it: layer2"),
    "mode": (["--mode", "hebbian"], "mode: expected one of sff, backprop"),
    "amp": (["--amp", "fp8"], "amp: expected one of bf16, fp16, fp32, got 'fp8'"),
    "narrow in channels_last": (["--channels-last"], "channels_last: expected a ResNet of width 16 or more"),
    "schedule": (["--schedule", "random"], "schedule: expected one of all, greedy"),
    "greedy with a window": (["--schedule", "greedy", "--window", "2"], "window: expected 1 with schedule='greedy'"),
    "micro-batches": (["--micro-batches", "16"], "micro_batches: expected parts of at least 2 images"),
    "clip": (["--clip", "0"], "clip: expected a finite number above 0"),
    "save every": (["--save-every", "0"], "save_every: expected a whole number of at least 1"),
    "freeze alone": (["--freeze", "2"], "freeze: expected 0 without --from"),
    "backprop in blocks": (
        ["--mode", "backprop", "--granularity", "layer"],
        "granularity: expected none with mode backprop",
    ),
    "resume nothing": (["--resume", "nowhere"], "nowhere: expected the folder of a run"),
    "from nothing": (["--from", "nowhere"], "nowhere: expected the folder of a run"),
    "resume an empty folder": (["--resume", "."], "checkpoint.pt: no such checkpoint"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_for_compare_and_train(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    options, message = WRONG[kind]
    for command in ("compare", "train"):
        assert message in refused(command, *TINY, *options)
    assert {p.name for p in tmp_path.iterdir()} <= {"file", "runs"}


@pytest.mark.parametrize("kind", WRONG_TRAIN)
def test_wrong_for_train(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, message = WRONG_TRAIN[kind]
    given = [] if "--resume" in options else [*TINY, "--out", "a"]
    assert message in refused("train", *given, *options)
    assert not (tmp_path / "a" / "checkpoint.pt").exists()


def test_wrong_modes_and_json(tmp_path):
    for modes in ("backprop,blok", "block,block", ""):
        assert "modes: expected names out of backprop" in refused("compare", *TINY, "--modes", modes, "--out", tmp_path)
    assert "json: expected a file" in refused("compare", *TINY, "--out", tmp_path, "--json", tmp_path)


def test_unknown_options_and_wrong_types(tmp_path):
    """Typer's own messages: also exit code 2, no traceback."""
    for arguments in (["train", "--epochz", "3"], ["train", "--epochs", "many"], ["predict", tmp_path], ["fly"]):
        _, err = call(*arguments, code=2)
        assert err.strip()


def test_wrong_with_a_run(trained, tmp_path):
    folder, _ = trained
    assert "holds a run already" in refused("train", *TINY, "--out", folder)
    assert "width: expected 2, as the run in" in refused("train", "--resume", folder, "--width", "4")
    assert "--out beside it" in refused("train", "--resume", folder, "--out", tmp_path)
    for options, message in (
        (["--width", "4"], "conv1.weight is [2, 1, 3, 3] there, [4, 1, 3, 3] here"),
        (["--model", "mobilenet_v3_small"], "it has resnet18 of width 2"),
        (["--freeze", "9"], "freeze: expected at most 8 of the 9 blocks, got 9"),
        (["--freeze", "1", "--schedule", "greedy"], "freeze: expected 0 with schedule greedy"),
    ):
        assert message in refused("train", *TINY, *options, "--from", folder, "--out", tmp_path / "new")


def test_wrong_for_predict(trained, pictures, tmp_path):
    folder, _ = trained
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(pictures[0].read_bytes()[:60])
    for image, message in (
        (tmp_path / "text.png", "not an image that can be read"),
        (tmp_path / "half.png", "not an image that can be read"),
        (tmp_path / "none.png", "no such file"),
        (tmp_path, "not an image that can be read"),
    ):
        found = refused("predict", folder, pictures[0], image)
        assert message in found and str(image) in found
    for threshold in ("0", "1.5"):
        assert "exit_threshold: expected a prob" in refused(
            "predict", folder, pictures[0], "--exit-threshold", threshold
        )
    assert "expected the folder of a run" in refused("predict", tmp_path / "nowhere", pictures[0])


def test_damaged_checkpoints(trained, pictures, tmp_path):
    folder, _ = trained
    whole = (folder / "checkpoint.pt").read_bytes()
    damaged = {"empty": b"", "cut short": whole[: len(whole) // 2], "text": b"hello"}
    for kind, content in damaged.items():
        (tmp_path / "checkpoint.pt").write_bytes(content)
        for command in (
            ["predict", tmp_path, pictures[0]],
            ["train", "--resume", tmp_path],
            ["train", *TINY, "--from", tmp_path],
        ):
            assert "not a readable fastff checkpoint" in refused(*command), kind
    torch.save({"weights": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    assert "expected a fastff checkpoint" in refused("train", "--resume", tmp_path)
    other = state(folder)
    torch.save(other | {"meta": None}, tmp_path / "checkpoint.pt")
    assert "does not say how to build the network" in refused("predict", tmp_path, pictures[0])
    other["module"].pop("model.conv1.weight")
    torch.save(other, tmp_path / "checkpoint.pt")
    assert "do not fit" in refused("predict", tmp_path, pictures[0])
    assert "do not fit" in refused("train", "--resume", tmp_path)


def test_a_loss_that_diverges(tmp_path):
    """Exit code 1, the block and the step named, the last checkpoint whole."""
    options = [*TINY, "--lr", "1e30", "--save-every", "1", "--out", tmp_path / "a"]
    _, err = call("train", *options, code=1)
    last = err.strip().splitlines()[-1]
    assert "became NaN or infinite at step" in last
    assert f"the last checkpoint {tmp_path / 'a' / 'checkpoint.pt'} is intact" in last
    assert all(torch.isfinite(v).all() for v in state(tmp_path / "a")["module"].values())


def test_an_implementation_that_cannot_run(tmp_path, monkeypatch):
    for name, message in (("warp", "FASTFF_IMPL: expected"), ("cuda", "FASTFF_IMPL='cuda': no implementation of")):
        monkeypatch.setenv("FASTFF_IMPL", name)
        assert message in refused("train", *TINY, "--out", tmp_path / "a")
    assert "no implementation of goodness" in call("info")[0]


def test_read_only_folder(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "out: expected a folder that can be written" in refused("train", *TINY, "--out", tmp_path / "locked" / "a")


def test_a_moved_run_goes_on(trained, tmp_path):
    """Nothing in a run knows its own folder."""
    folder, _ = trained
    shutil.copytree(folder, tmp_path / "moved")
    call("train", "--resume", tmp_path / "moved", "--epochs", "3")
    assert state(tmp_path / "moved")["position"]["epoch"] == 3
