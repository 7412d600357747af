"""What people do with a trained model: evaluate it, export it, look at its page in a browser."""

import base64
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch

for package in ("typer", "rich", "sklearn", "matplotlib", "PIL"):
    pytest.importorskip(package)

from command_line import TINY, call  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402

import fastff  # noqa: E402
from fastff.app import commands, experiment, export, page, plots, trained  # noqa: E402
from fastff.training import data, report  # noqa: E402


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs: "blocks", "backprop" and "stages"; and "compare"."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "said.txt").write_text(call("train", *TINY, "--out", folder / "blocks")[0], "utf-8")
    call("train", *TINY, "--mode", "backprop", "--out", folder / "backprop")
    call("train", *TINY, "--epochs", "1", "--granularity", "stage", "--schedule", "greedy", "--out", folder / "stages")
    call("compare", *TINY, "--epochs", "1", "--modes", "backprop,stage", "--out", folder / "compare")
    return folder


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", subset=96)


def images_in(network, digits):
    """The test images as an exported program takes them, and the probabilities of the network for them."""
    ((images, _),) = network.loader(digits.test_images, digits.test_labels, 1000)
    with torch.no_grad():
        return digits.test_images / 255, network.probabilities(images)[0]


# --- evaluate


@pytest.mark.parametrize("name", ["blocks", "backprop"])
def test_evaluate_counts_as_the_trainer_did(runs, digits, name, tmp_path):
    out, _ = call("evaluate", runs / name, "--json", tmp_path / "e.json")
    found = json.loads((tmp_path / "e.json").read_text())
    last = (runs / name / "metrics.csv").read_text().splitlines()
    last = dict(zip(last[0].split(","), last[-1].split(","), strict=True))
    assert found["accuracy"] == pytest.approx(float(last["test vote"]))
    blocks = {int(key.split()[-1]): float(value) for key, value in last.items() if key.startswith("test block")}
    assert found["blocks"] == pytest.approx(list(blocks.values()))
    names = [block.name for block in trained.load(runs / name).sff.blocks]
    assert found["block_names"] == [names[i] for i in blocks]
    for i, accuracy in blocks.items():  # with the defaults not all blocks vote
        for text in (out, (runs / "said.txt").read_text("utf-8")):
            assert re.search(rf"^ +{i} +{re.escape(names[i])} +{accuracy:.2%}", text, re.M), text
    _, wanted = images_in(trained.load(runs / name), digits)
    matrix = [[0] * 10 for _ in range(10)]
    for truth, answer in zip(digits.test_labels.tolist(), wanted.argmax(1).tolist(), strict=True):
        matrix[truth][answer] += 1
    assert found["confusion"] == matrix
    assert f"{found['accuracy']:.2%}" in out and f"{matrix[0][0] / sum(matrix[0]):.1%}" in out


def test_evaluate_with_early_exit(runs, digits):
    network = trained.load(runs / "blocks")
    found = trained.evaluate(network, digits.test_images, digits.test_labels, 0.3)
    ((images, target),) = network.loader(digits.test_images, digits.test_labels, 1000)
    left = network.sff.predict(images, 0.3)
    assert found.early[0] == pytest.approx(float((left.label == target).float().mean()))
    assert found.early[1] == pytest.approx(float((left.block + 1.0).mean()))
    sure = [probability for _, _, probability in found.wrong]
    assert sure == sorted(sure, reverse=True)
    assert all(digits.test_labels[index] != given for index, given, _ in found.wrong)
    assert len(found.wrong) == round((1 - found.accuracy) * len(digits.test_labels)) > 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--split", "validation"], 2, "split: expected one of test, train, got 'validation'"),
        (["--data", "nothing"], 2, "data: expected one of digits"),
        (["--exit-threshold", "2"], 2, "exit_threshold: expected a probability above 0"),
        (["--json", "."], 2, "json: expected a file, got the folder ."),
    ],
)
def test_evaluate_refuses(runs, options, code, message):
    assert message in call("evaluate", runs / "blocks", *options, code=code)[1]


def test_evaluate_on_a_folder_of_other_classes(runs, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (9, 9), (40 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
    err = call("evaluate", runs / "blocks", "--data", tmp_path, code=2)[1]
    assert "data: expected classes ['0', '1', '2'" in err and "got ['cat', 'dog']" in err


def test_the_picture_has_room_for_blocks_that_are_ahead_of_the_vote():
    run = {"history": [{"test_accuracy": accuracy} for accuracy in (0.8, 0.9)], "blocks": [0.97, 0.85]}
    low, high = plots._range([run])
    assert low < 80 and high > 97


def test_many_classes_are_told_by_their_confusions(runs):
    from fastff.app import commands

    confusion = torch.eye(20, dtype=torch.int64) * 5
    confusion[3, 4] = 5
    shown = io.StringIO()
    from rich.console import Console

    Console(file=shown).print(commands._confusions(confusion, [f"class{i}" for i in range(20)]))
    assert re.search(r"class3 +class4 +5 +50.0%", shown.getvalue()) and "class7" not in shown.getvalue()


# --- export

RUN_WITHOUT_FASTFF = """
import sys
sys.modules["fastff"] = None
import torch
files = {"classes": ""}
module = torch.export.load(sys.argv[1], extra_files=files).module()
print(float((module(torch.load(sys.argv[2])) - torch.load(sys.argv[3])).abs().max()), files["classes"])
"""


def test_torch_programs_need_no_fastff(runs, digits, tmp_path):
    name = "blocks"
    out, _ = call("export", runs / name, "--out", tmp_path)
    assert str(tmp_path / "model.pt2") in out and "the largest difference is" in out
    images, wanted = images_in(trained.load(runs / name), digits)
    torch.save(images, tmp_path / "images.pt")
    torch.save(wanted, tmp_path / "wanted.pt")
    files = [str(tmp_path / file) for file in ("model.pt2", "images.pt", "wanted.pt")]
    run = subprocess.run([sys.executable, "-c", RUN_WITHOUT_FASTFF, *files], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    off, classes = run.stdout.split(maxsplit=1)
    assert float(off) < 1e-5 and json.loads(classes) == [str(i) for i in range(10)]


@pytest.mark.parametrize("name", ["blocks", "backprop"])
def test_onnx_programs(runs, digits, name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    call("export", runs / name, "--format", "onnx", "--out", tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_modelmeta().custom_metadata_map["input"] == "float32 [B, C, H, W] in 0..1"
    images, wanted = images_in(trained.load(runs / name), digits)
    for size in (1, 3, len(images)):
        (found,) = session.run(None, {session.get_inputs()[0].name: images[:size].numpy()})
        assert (torch.from_numpy(found) - wanted[:size]).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_stages_are_the_votes_so_far(runs, digits, form, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    network = trained.load(runs / "stages")
    call("export", runs / "stages", "--format", form, "--stages", "--out", tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 4
    files = [len(module.state_dict()) for module in (export.Stage(network, i) for i in range(4))]
    assert sum(files) < len(network.sff.state_dict()) + 8, "each has the weights of its own block"
    images, wanted = images_in(network, digits)
    ((normalized, _),) = network.loader(digits.test_images, digits.test_labels, 1000)
    with torch.no_grad():
        goodness = network.sff.goodness(normalized)
    given = (images,)
    for index, path in enumerate(paths):
        (given,) = export._run(path, form, [given])
        assert (given[0] - network.sff.votes(goodness[: index + 1])).abs().max() < 1e-5
    assert len(given) == 1 and (given[0] - wanted).abs().max() < 1e-5


def test_a_wrong_program_is_removed(runs, tmp_path, monkeypatch):
    op = torch.ops.fastff.normalize.default
    right = export.DEFINITIONS[op]
    monkeypatch.setitem(export.DEFINITIONS, op, lambda *arguments: 1.001 * right(*arguments))
    err = call("export", runs / "stages", "--out", tmp_path, code=1)[1]
    assert "model.pt2: expected the probabilities of the network to 1e-05" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("blocks", ["--format", "tflite"], "format: expected one of torch, onnx, got 'tflite'"),
        ("backprop", ["--stages"], "stages: expected a network whose blocks vote"),
        ("nothing", [], "expected the folder of a run"),
    ],
)
def test_export_refuses(runs, name, options, message):
    assert message in call("export", runs / name, *options, code=2)[1]


def test_onnx_that_is_not_installed(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    err = call("export", runs / "blocks", "--format", "onnx", code=2)[1]
    assert 'pip install "fastff[export]"' in err


# --- pages

PAGES = {"blocks": "report.html", "stages": "report.html", "backprop": "report.html", "compare": "compare.html"}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_one_file_of_valid_html(runs, name):
    html5lib = pytest.importorskip("html5lib")
    text = (runs / name / PAGES[name]).read_text(encoding="utf-8")
    tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)  # raises at the first error
    sources = [image.get("src") for image in tree.iter("img")]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not [e for e in tree.iter() if e.tag in ("script", "link", "iframe") or e.get("href")]
    assert all(image.get("alt") for image in tree.iter("img"))
    for source in sources:
        kind, content = source.split(";base64,")
        content = base64.b64decode(content)
        if kind == "data:image/svg+xml":
            assert content.startswith(b"<?xml") and b"nan" not in re.findall(rb' d="([^"]*)"', content)
        else:
            Image.open(io.BytesIO(content)).verify()


def test_the_page_of_a_run_has_its_figures(runs, digits):
    text = (runs / "blocks" / "report.html").read_text(encoding="utf-8")
    network = trained.load(runs / "blocks")
    found = trained.evaluate(network, digits.test_images, digits.test_labels)
    assert f"{found.accuracy:.2%} are classified correctly by the vote of the blocks" in text
    voters = [network.sff.blocks[i] for i in network.sff.plan.voters]
    for block, accuracy in zip(voters, found.blocks, strict=True):
        assert f"<td>{block.name}</td>" in text and f"<td>{accuracy:.2%}</td>" in text
    for i, block in enumerate(network.sff.blocks):  # a head without a loss learns nothing, and does not count
        head = network.sff.heads[i].parameters() if i in network.sff.plan.voters else ()
        count = sum(p.numel() for p in (*block.parameters(), *head))
        assert f"<td>{block.name}</td><td>{count:,}</td>" in text
    index, given, sure = found.wrong[0]
    assert f"{int(digits.test_labels[index])}, taken for {given} ({sure:.0%})" in text
    assert text.count("data:image/png") == page.SHOWN < len(found.wrong)


def test_names_are_escaped(tmp_path):
    page.write(tmp_path / "p.html", "<b>", [{"columns": ("a&b",), "rows": [("<script>",)], "text": "x < y"}])
    text = (tmp_path / "p.html").read_text()
    assert "<script>" not in text and "<b>" not in text and "x &lt; y" in text


def test_a_resumed_run_draws_all_its_epochs(runs, tmp_path):
    shutil.copytree(runs / "blocks", tmp_path / "a")
    (tmp_path / "a" / "report.html").unlink()
    call("train", "--resume", tmp_path / "a", "--epochs", "3")
    assert "for 3 epochs" in (tmp_path / "a" / "report.html").read_text(encoding="utf-8")


def test_without_matplotlib_there_is_no_page(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out, _ = call("train", *TINY, "--epochs", "1", "--out", tmp_path)
    assert "no report.html: it needs matplotlib" in out and not (tmp_path / "report.html").exists()
    assert (tmp_path / "checkpoint.pt").exists()


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("name", PAGES)
def test_a_browser_shows_the_page(runs, name, width, tmp_path):
    """A screenshot has the colours of the pictures on it; narrow too."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no browser found: Debian's package chromium, for example, has one")
    shot = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    options += ["--no-first-run", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--hide-scrollbars", f"--window-size={width},4000", f"--screenshot={shot}"]
    address = (runs / name / PAGES[name]).resolve().as_uri()
    with contextlib.suppress(subprocess.TimeoutExpired):  # it may wait for the network after the picture is written
        subprocess.run([browser, *options, address], capture_output=True, timeout=60)
    with Image.open(shot) as image:
        assert image.size == (width, 4000)
        colours = image.convert("RGB").getcolors(1 << 22)
    # Curves and areas are dark violet to green, which nothing outside the pictures is.
    drawn = sum(n for n, (r, g, b) in colours if b > r and max(r, g, b) - min(r, g, b) > 40)
    assert drawn > 10, "without the pictures there is none; narrow, the right parts of them are scrolled out"
    inked = sum(n for n, colour in colours if colour != (255, 255, 255)) / (width * 4000)
    assert 0.01 < inked < 0.9


# --- what a terminal, a pipe and a log get


def test_tables_do_not_fold_in_a_pipe(runs, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    with pytest.raises(SystemExit):
        commands.app(["evaluate", str(runs / "blocks")])
    assert re.search(r"^ +\d +layer\S+ +\d+\.\d\d%", capsys.readouterr().out, re.M)


def test_no_colour_in_a_pipe_and_with_no_color(runs, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    out, err = call("evaluate", runs / "blocks")
    assert not re.search(r"\x1b\[[\d;]*3\dm", out + err)


def test_settings_of_the_run_are_those_it_was_trained_with(runs):
    assert experiment.read_run(runs / "blocks")[1]["settings"]["width"] == 2


def test_a_long_epoch_says_how_far_it_is(monkeypatch, capsys):
    """In a pipe or a log, once a minute; each epoch has its line."""
    monkeypatch.setattr(report, "MINUTE", 0.0)
    images, target = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    sff = fastff.SFF(fastff.models.resnet18(10, width=2, stem="cifar", in_channels=1), 10, "stage", (1, 8, 8))
    fastff.Trainer(sff).fit([(images, target)] * 2, 1)
    lines = capsys.readouterr().err.splitlines()
    assert re.match(r"epoch   1/1 50%, \d+ s left, [\d,]+ images/s", lines[0])
    assert lines[-1].startswith("epoch   1/1 ") and "loss" in lines[-1] and len(lines) == 3


@pytest.mark.parametrize(
    ("names", "width"), [(["stem", "a.very.long.path.that.ends.in.conv2"], 80), ([f"layer{i}" for i in range(40)], 60)]
)
def test_the_live_display_fits_into_the_terminal(names, width):
    """A bar, and each block that has a loss, beside each other where there are many."""
    trainer = types.SimpleNamespace(names=names, device=torch.device("cpu"), steps=0)
    shown = report.Report(None, True)
    shown.start(trainer, 2, 10)
    shown.first = 0
    totals = torch.stack([torch.arange(len(names)), torch.arange(len(names)) / 100, torch.ones(len(names))])
    totals[:, 0] = 0  # of a block without a loss
    state = types.SimpleNamespace(position={"epoch": 0}, totals=totals)
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=24, color_system=None)
    shown.live = types.SimpleNamespace(console=console)
    console.print(shown._display(state, 100.0, 5))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) < width and len(lines) < 24
    assert names[0] not in console.file.getvalue() and f"{len(names) - 1:.3f}" in console.file.getvalue()
    assert names[-1][-30:] in console.file.getvalue()


def test_a_notebook_gets_lines_that_do_not_look_like_failures(monkeypatch, capsys):
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stderr", stream)
    report.Report(None, True)._print("epoch 1")
    assert capsys.readouterr().out == "epoch 1\n" and not stream.getvalue()


def test_a_gpu_trains_in_bf16_unless_told_otherwise(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert experiment.amp_on(gpu, None) == ("bf16" if has else None)
        assert experiment.amp_on(gpu, "fp32") == "fp32"
        assert experiment.amp_on(gpu, "fp16") == "fp16"
        assert experiment.amp_on(cpu, None) is None
    sff = fastff.SFF(fastff.models.resnet18(10, stem="cifar", width=4), 10, input_shape=(3, 8, 8))
    assert experiment.build_trainer(experiment.settings(amp="fp32"), sff).options.amp is None
