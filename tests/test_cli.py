"""The command line on tiny settings: what commands print and write, resuming, transfer, what bad input is told."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from typer.testing import CliRunner  # noqa: E402

import fastff  # noqa: E402
from fastff.app import experiment  # noqa: E402
from fastff.app import trained as trained_network  # noqa: E402
from fastff.cli import make_app  # noqa: E402
from fastff.training import checkpoint, data  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--data", "digits", "--subset", "96", "--width", "2", "--batch-size", "16", "--epochs", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Tables that fold nothing; rich wants both."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "50")


def call(*arguments, code=0):
    """Run a command in this process; returns (stdout, stderr)."""
    found = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(make_app(), [str(a) for a in arguments])
    trouble = found.exception if not isinstance(found.exception, SystemExit) else None
    assert found.exit_code == code, f"exit code {found.exit_code}: {found.output} {trouble!r}"
    assert trouble is None and "Traceback" not in found.output
    return found.stdout, found.stderr


def refused(*arguments):
    """The one line that bad input gets."""
    out, err = call(*arguments, code=2)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastff: "), err
    return lines[0].removeprefix("fastff: ")


def state(folder):
    return checkpoint.load(Path(folder) / "checkpoint.pt")


def assert_same_bits(a, b, where="checkpoint"):
    """Everything in two checkpoints but the seconds that things took."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds"}:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where  # NaN is of a block that was not trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 2 epochs, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    return folder, call("train", *TINY, "--out", folder)[0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Test images of digits as files."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = data.load("digits")
    for i, label in enumerate(digits.test_labels[:20].tolist()):
        Image.fromarray(digits.test_images[i, 0].numpy()).save(folder / f"{i:02d}-{label}.png")
    return sorted(folder.iterdir())


# --- compare


def test_compare(tmp_path):
    """The JSON as the interface has it, the table, and a picture with something on it."""
    modes = ["backprop", "block", "layer", "stage"]
    where = ["--out", tmp_path / "new" / "out", "--json", tmp_path / "other" / "c.json", "--modes", ",".join(modes)]
    out, _ = call("compare", *TINY, *where)
    result = json.loads((tmp_path / "other" / "c.json").read_text())
    assert [run["mode"] for run in result["runs"]] == modes
    losses = {"backprop": 0, "block": 2, "layer": 17, "stage": 4}
    for run in result["runs"]:
        assert 0 <= run["test_accuracy"] <= 1 and 0 <= run["train_accuracy"] <= 1
        assert run["epochs"] == 2 and run["seconds_per_epoch"] > 0 and run["peak_memory_mb"] > 0
        assert [row["epoch"] for row in run["history"]] == [1, 2]
        assert 0 < run["history"][0]["seconds"] < run["history"][1]["seconds"]
        assert run["history"][1]["test_accuracy"] == run["test_accuracy"]
        assert len(run["blocks"]) == len(run["block_names"]) == losses[run["mode"]]
        reached = [
            row["seconds"] for row in run["history"] if row["test_accuracy"] >= result["runs"][0]["test_accuracy"]
        ]
        assert run["seconds_to_backprop"] == (reached[0] if reached else None)
        assert f"{run['test_accuracy']:.2%}" in out and f"{run['peak_memory_mb']:.1f} MiB" in out
    assert {"device", "threads", "torch", "python", "fastff", "commit"} <= result["environment"].keys()
    assert result["settings"]["width"] == 2
    for words in ("mode", "test", "train", "s / epoch", "time to backprop's", "peak memory", "compare.png", "c.json"):
        assert words in out
    with Image.open(tmp_path / "new" / "out" / "compare.png") as image:
        assert min(image.size) > 500
        colours = image.convert("RGB").getcolors(1 << 20)
    inked = sum(count for count, colour in colours if colour != (255, 255, 255))
    assert 0.01 < inked / sum(count for count, _ in colours) < 0.6
    for wanted in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        near = [c for c, colour in colours if max(abs(a - b) for a, b in zip(colour, wanted, strict=True)) < 3]
        assert sum(near) > 500, "the bar of a run"


def test_compare_is_fair_and_repeats_itself(tmp_path):
    """The same weights and batches in every mode; the same figures twice; what is measured changes nothing."""
    s = experiment.settings(data="digits", subset=96, width=2, epochs=1)
    dataset = experiment.load_data(s)
    nets = [
        experiment.build_network(s | {"mode": mode, "granularity": cut}, 10, (1, 8, 8)).model.state_dict()
        for mode, cut in (("backprop", "block"), ("sff", "block"), ("sff", "layer"), ("sff", "stage"))
    ]
    for net in nets[1:]:
        assert_same_bits(dict(nets[0]), dict(net))
    first, second = (next(iter(experiment.loaders(s, dataset, "cpu")[0]))[0] for _ in range(2))
    assert torch.equal(first, second)
    one = ["compare", *TINY, "--epochs", "1", "--modes", "block", "--out", tmp_path, "--json", tmp_path / "c.json"]
    runs = []
    for _ in range(2):
        out, _ = call(*one)
        runs.append(json.loads((tmp_path / "c.json").read_text())["runs"][0])
    assert "not trained" in out, "there is no time to an accuracy that is unknown"
    assert runs[0]["seconds_to_backprop"] is None
    for key in ("test_accuracy", "train_accuracy", "blocks", "peak_memory_mb"):
        assert runs[0][key] == runs[1][key]


def test_compare_mobilenet(tmp_path):
    out, _ = call(
        "compare", *TINY, "--epochs", "1", "--model", "mobilenet_v3_small", "--modes", "block", "--out", tmp_path
    )
    assert "block" in out and (tmp_path / "compare.png").exists()


# --- train and resume


def test_train(trained):
    folder, out = trained
    assert {"checkpoint.pt", "metrics.csv"} <= {p.name for p in folder.iterdir()}
    assert "SFF: ResNet in 9 blocks" in out and "layer4.1" in out and "their vote" in out
    assert f"predict {folder}" in out.replace("\n", "")
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3 and "test vote" in rows[0]
    shown = state(folder)["history"][-1]["test block 3"]
    assert f"{shown:.2%}" in out


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--mode", "backprop", "--model", "mobilenet_v3_small", "--contiguous"],
        ["--granularity", "layer1.0,layer2.1", "--window", "1", "--micro-batches", "3", "--clip", "1", "--amp", "bf16"],
        ["--schedule", "greedy", "--granularity", "stage", "--seed", "5", "--grid", "0", "--lr", "1e-3"],
    ],
)
def test_resume_repeats_the_bits(tmp_path, monkeypatch, options):
    """Stopped in the middle of an epoch, resumed with nothing but the folder (from another place): no bit differs."""
    monkeypatch.chdir(tmp_path)
    call("train", *TINY, *options, "--out", "whole")
    stop_at = 9

    def interrupted(self, position):
        for index, batch in enumerate(original(self, position)):
            if self.epoch * len(self) + position + index == stop_at:
                signal.raise_signal(signal.SIGINT)
            yield batch

    original = data.Loader.iter_from
    with monkeypatch.context() as patch:
        patch.setattr(
            data.Loader, "iter_from", lambda self, p: interrupted(self, p) if self.shuffle else original(self, p)
        )
        _, err = call("train", *TINY, *options, "--out", "parts", code=130)
    assert "continue with --resume parts" in err
    assert state("parts")["position"]["batch"] > 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    call("train", "--resume", tmp_path / "parts")
    assert_same_bits(state(tmp_path / "whole"), state(tmp_path / "parts"))
    if options:
        return
    out, _ = call("train", "--resume", tmp_path / "parts")
    assert "all 2 epochs are done" in out and "their vote" in out
    call("train", "--resume", tmp_path / "parts", "--epochs", "3")
    assert state(tmp_path / "parts")["position"]["epoch"] == 3
    assert state(tmp_path / "parts")["meta"]["settings"]["epochs"] == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_a_process_of_its_own(tmp_path, number):
    """A real SIGINT or SIGTERM: exit code 128 and its number, the step finished and saved, one message that says how to go on; and it does."""
    arguments = ["train", *TINY, "--epochs", "200", "--out", tmp_path / "a"]
    command = [sys.executable, "-m", "fastff.cli", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "a" / "metrics.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    assert "Traceback" not in out + err
    stopped = state(tmp_path / "a")
    last = err.strip().splitlines()[-1]
    assert last == f"fastff: stopped after step {stopped['steps']}; continue with --resume {tmp_path / 'a'}"
    done = stopped["position"]["epoch"]
    call("train", "--resume", tmp_path / "a", "--epochs", done + 1)
    assert state(tmp_path / "a")["position"] == {"epoch": done + 1, "batch": 0}
    assert len(state(tmp_path / "a")["history"]) == done + 1


# --- transfer


def test_from_takes_the_blocks_and_freeze_keeps_them(trained, tmp_path):
    """All blocks' weights; the heads too, as there are as many classes; the first two blocks stay to the bit. Heads that vote learn."""
    folder, _ = trained
    call("train", *TINY, "--epochs", "1", "--from", folder, "--freeze", "2", "--seed", "3", "--out", tmp_path / "b")
    old, new = state(folder)["module"], state(tmp_path / "b")["module"]
    for key in old:
        still = key.startswith(("model.conv1.", "model.bn1.", "model.layer1.0."))
        if key.startswith("model.") and not key.startswith("model.fc.") and not key.endswith("num_batches_tracked"):
            assert torch.equal(old[key], new[key]) == still, key
        if key.startswith("heads.") and not key.endswith("num_batches_tracked"):
            assert torch.equal(old[key], new[key]) == (not key.startswith(("heads.3.", "heads.8."))), key
    assert state(tmp_path / "b")["meta"]["settings"]["freeze"] == 2
    call("train", "--resume", tmp_path / "b", "--epochs", "2")
    later = state(tmp_path / "b")["module"]
    assert torch.equal(old["model.layer1.0.conv1.weight"], later["model.layer1.0.conv1.weight"])


def test_transfer_matches_blocks_by_name(trained, tmp_path):
    folder, _ = trained
    saved = state(folder)["module"]
    s = experiment.settings(data="digits", width=2, seed=9)

    def fresh(**other):
        return experiment.build_network(s | other, other.pop("classes", 10), (1, 8, 8))

    net = fresh()
    experiment.transfer(net, folder)
    for key, value in net.state_dict().items():
        assert torch.equal(value, saved[key]), key
    layers, untouched = fresh(granularity="layer"), fresh(granularity="layer")
    experiment.transfer(layers, folder)
    names = [block.name for block in layers.blocks]
    for index, name in enumerate(names):
        own, before = layers.heads[index].weight, untouched.heads[index].weight
        assert torch.equal(own, saved["heads.0.weight"]) if name == "conv1" else torch.equal(own, before)
    fewer = fresh(classes=4)
    heads = [p.clone() for p in fewer.heads.parameters()]
    experiment.transfer(fewer, folder)
    assert torch.equal(fewer.model.layer4[1].conv2.weight, saved["model.layer4.1.conv2.weight"])
    assert all(torch.equal(a, b) for a, b in zip(heads, fewer.heads.parameters(), strict=True))
    call("train", *TINY, "--epochs", "1", "--mode", "backprop", "--from", folder, "--out", tmp_path / "c")
    back = fresh()
    experiment.transfer(back, tmp_path / "c")
    got = back.state_dict()
    assert all(torch.equal(got[f"model.{k}"], v) for k, v in state(tmp_path / "c")["module"].items())


# --- predict


def test_predict(trained, pictures):
    """Classes of files are those the network gives the same images as tensors."""
    folder, _ = trained
    state_, meta = experiment.read_run(folder)
    sff = experiment.build_network(meta["settings"], 10, (1, 8, 8))
    sff.load_state_dict(state_["module"])
    sff.eval()
    digits = data.load("digits", subset=96)
    images = next(iter(digits.test_loader(20)))[0]
    found, votes = sff.predict(images), [g.argmax(1) for g in sff.goodness(images)]
    answers = trained_network.classify(folder, pictures, torch.device("cpu"))
    assert [answer.label for answer in answers] == [str(int(label)) for label in found.label]
    assert [answer.confidence for answer in answers] == pytest.approx(found.confidence.tolist(), rel=1e-5)
    for i, answer in enumerate(answers):
        assert [label for _, label, _ in answer.blocks] == [str(int(vote[i])) for vote in votes]
    out, _ = call("predict", folder, *pictures[:2])
    assert str(pictures[1]) in out and f"{answers[0].confidence:.1%}" in out and "layer4.1" in out
    out, _ = call("predict", folder, pictures[0], "--exit-threshold", "0.0001")
    assert "layer2.0" in out and "layer4.1" not in out


def test_predict_resizes_and_reads_colours(trained, pictures, tmp_path):
    folder, _ = trained
    with Image.open(pictures[0]) as image:
        image.convert("RGB").resize((64, 48)).save(tmp_path / "big.jpg")
    assert len(trained_network.classify(folder, [tmp_path / "big.jpg"], torch.device("cpu"))[0].blocks) == 2


def test_predict_of_backpropagation_and_folders(tmp_path):
    """A folder of images as data: its class names come back."""
    generator = torch.Generator().manual_seed(0)
    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(15):
            noise = torch.randint(-25, 25, (3,), generator=generator).tolist()
            image = Image.new("RGB", (20, 16), tuple(a + b for a, b in zip(colour, noise, strict=True)))
            image.save(tmp_path / "data" / name / f"{i}.png")
    settings = [
        "--data",
        tmp_path / "data",
        "--image-size",
        "12",
        "--width",
        "2",
        "--batch-size",
        "8",
        "--device",
        "cpu",
    ]
    picture = tmp_path / "data" / "red" / "3.png"
    for mode in ("sff", "backprop"):
        call("train", *settings, "--mode", mode, "--epochs", "8", "--out", tmp_path / mode)
        out, _ = call("predict", tmp_path / mode, picture)
        assert "red" in out.replace(str(picture), "")
    assert "backpropagation" in out
    assert "exit_threshold" in refused("predict", tmp_path / "backprop", picture, "--exit-threshold", "0.5")
    (tmp_path / "data" / "red" / "4.png").unlink()
    assert "data: expected the data set of the run" in refused("train", "--resume", tmp_path / "sff", "--epochs", "9")


# --- info


def test_info(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTFF_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTFF_IMPL", raising=False)
    from fastff.ops import TABLES, plan

    plan.second_moment_factor.cache_clear()
    out, _ = call("info")
    for words in (
        torch.__version__,
        "compiled library",
        "FASTFF_IMPL",
        "not set",
        "default",
        "plan.json",
        "auto takes it",
    ):
        assert words in out
    for op, rows in TABLES.items():
        assert op in out and all(row.name in out for row in rows)
    monkeypatch.setenv("FASTFF_IMPL", "reference")
    out, _ = call("info")
    assert out.count("auto takes it") == out.count("reference  ") == len(TABLES) * (1 + torch.cuda.is_available())
    monkeypatch.setattr(plan, "CALIBRATION_SHAPES", [(2, 8, 16, 4)])
    assert "bench --tune measures it here" in out and "Triton sizes" in out
    call("bench", "--tune", "--rounds", "1")
    out, _ = call("info")
    assert (tmp_path / "plan.json").exists() and f"({tmp_path / 'plan.json'})" in out
    plan.second_moment_factor.cache_clear()
    plan.plan.cache_clear()


def test_help_lists_what_there_is():
    out, _ = call("--help")
    assert all(name in out for name in ("compare", "train", "predict", "bench", "info"))
    out, _ = call("train", "--help")
    assert "--resume" in out and "--freeze" in out


def test_short_help_version_and_module():
    for arguments, wanted in (
        (["-h"], "--version"),
        (["info", "-h"], "Show versions"),
        (["--version"], fastff.__version__),
    ):
        run = subprocess.run([sys.executable, "-m", "fastff", *arguments], capture_output=True, text=True)
        assert run.returncode == 0 and wanted in run.stdout, run


def test_without_terminal_streams_and_with_a_closed_pipe():
    code = "import sys; sys.stdout = sys.stderr = None; sys.argv = ['fastff', 'train', '--data', 'nonsense']; from fastff.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "")
    run = subprocess.run(f"{sys.executable} -m fastff info | head -1", shell=True, capture_output=True, text=True)
    assert run.stdout.startswith("fastff") and run.stderr == ""


def test_without_typer_the_message_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from fastff.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and 'pip install "fastff[train]"' in run.stderr and "Traceback" not in run.stderr


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
