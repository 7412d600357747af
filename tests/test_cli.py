"""The command line on tiny settings: what commands print and write, resuming, transfer."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for package in ("typer", "rich", "sklearn", "matplotlib", "PIL"):
    pytest.importorskip(package)

from command_line import TINY, assert_same_bits, call, refused, state  # noqa: E402
from PIL import Image  # noqa: E402

import fastff  # noqa: E402
from fastff.app import experiment  # noqa: E402
from fastff.app import trained as trained_network  # noqa: E402
from fastff.training import data  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

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
        assert len(run["block_depths"]) == losses[run["mode"]]
        if run["mode"] == "block":  # 9 blocks, of which the default plan ends segments at these
            assert run["block_depths"] == [4 / 9, 1]
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


@pytest.mark.parametrize(
    ("images", "micro_batches", "replicas", "dropped"),
    [(65, 1, 1, True), (65, 1, 2, True), (66, 1, 1, False), (66, 1, 2, True), (69, 4, 1, True), (70, 4, 1, False), (128, 1, 2, False)],
)  # fmt: skip
def test_a_last_minibatch_too_small_for_batch_norm_is_dropped(images, micro_batches, replicas, dropped):
    s = experiment.settings(data="digits", subset=images, micro_batches=micro_batches)
    train, _ = experiment.loaders(s, experiment.load_data(s), "cpu", replicas)
    assert train.drop_last == dropped


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
        deadline = time.monotonic() + 300
        while not (tmp_path / "a" / "metrics.csv").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
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
