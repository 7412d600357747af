"""The commands of the command line: arguments, tables, exit codes. The other files of this folder do the work."""

import collections
import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import fastff
from fastff import bench as benchmark
from fastff import cache, parallel
from fastff.app import compare as comparison
from fastff.app import environment as here
from fastff.app import experiment, page, plots, trained
from fastff.app import export as exporting
from fastff.arguments import check_member, first_line, whole_number
from fastff.ops import plan
from fastff.parallel.watch import RankFailed, prints_failure
from fastff.training import checkpoint
from fastff.training.fit import Diverged

app = typer.Typer(
    help=fastff.__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _print_version(wanted):
    if wanted:
        say(f"fastff {fastff.__version__}")
        raise typer.Exit


@app.callback(help=fastff.__doc__)
def everywhere(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
):
    """Options of no command."""


def command(function):
    """Add a command. Errors that a user can cause become one line on stderr; others are bugs and keep their traceback.

    FASTFF_DEBUG=1 keeps all tracebacks."""

    @functools.wraps(function)
    def run(*args, **options):
        try:
            return function(*args, **options)
        except KeyboardInterrupt as error:
            message, code = str(error) or "stopped", 128 + getattr(error, "number", signal.SIGINT)
        except BrokenPipeError:
            raise
        except torch.OutOfMemoryError as error:
            advice = "Smaller --batch-size, more --micro-batches or a smaller --memory need less memory."
            message, code = f"{first_line(error)} {advice}", 1
        except (Diverged, RankFailed, exporting.ExportError) as error:
            message, code = str(error), 1
        except (ValueError, OSError, ImportError) as error:
            message, code = str(error), 2
            if os.environ.get("FASTFF_DEBUG") == "1":
                raise
        if prints_failure():
            print(f"fastff: {message}", file=sys.stderr, flush=True)
        raise typer.Exit(code)

    return app.command()(run)


def show(shown):
    """Print a table, in a file or a pipe as wide as it is."""
    console = Console()
    if not console.is_terminal:
        console.width = max(
            console.width, console.measure(shown, options=console.options.update(max_width=10**4)).maximum
        )
    console.print(shown)


def say(text):
    """Print a line as it is."""
    Console().print(text, highlight=False, soft_wrap=True, markup=False)


def table(*columns, title=None):
    """Return an empty table. Columns whose names begin with > are aligned right."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in columns:
        made.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return made


def option(text, *names):
    """Return the option of an argument: its help, and its names if they differ from the argument's."""
    return typer.Option(*names, help=text)


default = experiment.DEFAULTS
data_sets = "digits, mnist, fashion-mnist, cifar10, cifar100, imagenette, or a folder of images by class."
Data = Annotated[str | None, option(f"{data_sets} Default: {default['data']}.", "--data")]
Root = Annotated[str | None, option("Folder with the data set's official files; nothing is downloaded then.")]
Model = Annotated[str | None, option(f"{', '.join(experiment.MODELS)}. Default: {default['model']}.")]
Width = Annotated[int | None, option(f"Channels that the network starts with. Default: {default['width']}.")]
Epochs = Annotated[int | None, option(f"Times through the training images. Default: {default['epochs']}.")]
Batch = Annotated[int | None, option(f"Images in a minibatch. Default: {default['batch_size']}.")]
Lr = Annotated[float | None, option("Learning rate. Default: 4e-3 block by block, 2e-3 for backpropagation.")]
Decay = Annotated[float | None, option(f"Weight decay. Default: {default['weight_decay']}.")]
Updates = Annotated[
    str | None,
    option(
        f"muon: orthogonalised updates of convolutions, AdamW for the rest; or adamw. Default: {default['optimizer']}."
    ),
]
Subset = Annotated[int | None, option("Train on this many images, equally many of each class.")]
Size = Annotated[int | None, option("Height and width of images from folders (64) and Imagenette (160).")]
Seed = Annotated[int | None, option("Seed of weights, order, augmentation and subset. Default: 0.")]
Device = Annotated[str | None, option("cpu or cuda. Default: cuda where there is one.")]
windows = "Blocks that a local loss trains: its own and those before. Default: 2 with another granularity than auto."
Window = Annotated[int | None, option(windows)]
plans = "Instead of a window: the blocks that end segments, such as 1,3,8, or several such lists, which take turns, with |; or pairs, drawn."
Plan = Annotated[str | None, option(plans)]
budgets = "Instead of a plan: what a step may take, as a share of backpropagation's memory (0.4) or in bytes; the fewest segments that do."
Memory = Annotated[float | None, option(budgets)]
Grid = Annotated[int | None, option("Cells on a side of the spatial term; 0 for none. Default: 4.")]
Hidden = Annotated[int | None, option("Channels of the spatial term's hidden layer; 0 for none. Default: 64.")]

cuts = "What a block is: layer, block, stage, model, or module paths that end blocks, with commas. Default: auto, blocks in a few segments."
Cut = Annotated[str | None, option(cuts)]
schedules = "all: every block in every minibatch; greedy: one after the other. Default: all."
Schedule = Annotated[str | None, option(schedules)]
Layout = Annotated[bool | None, option("Memory format. Default: channels last.", "--channels-last/--contiguous")]


@command
def compare(
    data: Data = None, root: Root = None, model: Model = None, width: Width = None, epochs: Epochs = None,
    batch_size: Batch = None, lr: Lr = None, weight_decay: Decay = None, optimizer: Updates = None, subset: Subset = None,
    image_size: Size = None, seed: Seed = None, window: Window = None, plan: Plan = None,
    memory: Memory = None, grid: Grid = None, hidden: Hidden = None, device: Device = None,
    modes: Annotated[str, option(f"Names out of {', '.join(comparison.MODES)}, with commas.")] = "backprop,block,layer",
    out: Annotated[Path, option("Folder for the picture.")] = Path("runs/compare"),
    json_file: Annotated[Path | None, option("Write all figures to this file.", "--json")] = None,
):  # fmt: skip
    """Train one network in several ways: table, picture, JSON."""
    s = experiment.settings(**{key: value for key, value in locals().items() if key in experiment.DEFAULTS})
    names, where = comparison.modes_named(modes), experiment.device_named(device)
    experiment.writable_folder(out)
    if json_file is not None:
        _writable_file(json_file)
    result = comparison.compare(s, names, where, say=say)
    figure = plots.picture(result, out / "compare.png")
    page.of_comparison(result, figure, out / "compare.html")
    shown = table("mode", ">test", ">train", ">s / epoch", ">time to backprop's", ">peak memory")
    shown.caption = "time: of training, to the final test accuracy of backpropagation\n"
    shown.caption += "memory: of a step, above parameters and optimiser state"
    shown.caption_justify = "left"
    based = any(run["mode"] == "backprop" for run in result["runs"])
    for run in result["runs"]:
        needed = run["seconds_to_backprop"]
        shown.add_row(
            run["mode"], f"{run['test_accuracy']:.2%}", f"{run['train_accuracy']:.2%}", f"{run['seconds_per_epoch']:.2f}",
            f"{needed:.1f} s" if needed is not None else "not reached" if based else "not trained",
            f"{run['peak_memory_mb']:.1f} MiB",
        )  # fmt: skip
    show(shown)
    say(f"picture: {out / 'compare.png'}, page: {out / 'compare.html'}")
    if json_file is not None:
        _write_json(json_file, result)


def _writable_file(path):
    """Raises ValueError, before any work is done, if the file of --json cannot be written."""
    experiment.writable_folder(path.parent, "json")
    if path.is_dir():
        raise ValueError(f"json: expected a file, got the folder {path}")


def _write_json(path, result):
    text = json.dumps(result, indent=1, allow_nan=False)
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))
    say(f"figures: {path}")


def _accuracies(title, sff, blocks, vote):
    """Return the table of accuracies of the blocks that vote and of their vote. blocks: none of a network trained by backpropagation."""
    shown = table(">block", "ends with", ">accuracy", title=title)
    for index, accuracy in zip(sff.plan.voters if blocks else (), blocks, strict=True):
        shown.add_row(str(index), sff.blocks[index].name, f"{accuracy:.2%}")
    shown.add_row("", "all: their vote" if blocks else "backpropagation", f"{vote:.2%}")
    return shown


@command
def train(
    data: Data = None, root: Root = None, model: Model = None, width: Width = None, granularity: Cut = None,
    mode: Annotated[str | None, option("sff or backprop. Default: sff.")] = None,
    epochs: Epochs = None, batch_size: Batch = None, lr: Lr = None, weight_decay: Decay = None, optimizer: Updates = None,
    subset: Subset = None, image_size: Size = None, seed: Seed = None, window: Window = None, plan: Plan = None,
    memory: Memory = None, grid: Grid = None, hidden: Hidden = None, schedule: Schedule = None,
    finish: Annotated[float | None, option("How early the first block finishes, in 0..1; the others in proportion. Default: 0.")] = None,
    micro_batches: Annotated[int | None, option("Parts a minibatch is cut into. Default: 1.")] = None,
    clip: Annotated[float | None, option("Largest norm of a block's gradients.")] = None,
    amp: Annotated[str | None, option("bf16, fp16 or fp32. Default: bf16 on a GPU that has it, else fp32.")] = None,
    compile: Annotated[bool | None, option("Run blocks through torch.compile.", "--compile/--no-compile")] = None,
    channels_last: Layout = None, device: Device = None,
    out: Annotated[Path | None, option("New folder for everything about the run. Default: runs/train.")] = None,
    save_every: Annotated[int, option("Steps between checkpoints, beside the one after each epoch.")] = 200,
    start_from: Annotated[Path | None, option("Start with the blocks of this run (transfer).", "--from")] = None,
    freeze: Annotated[int | None, option("First blocks that stay as --from gave them; their heads learn.")] = None,
    resume: Annotated[Path | None, option("Go on with this run; only --epochs and --root can change.")] = None,
    block_ranks: Annotated[int, option("Of torchrun's processes, how many share the blocks of one network.")] = 1,
    batch_norm: Annotated[
        str | None, option("Over a process's share of a minibatch, local, or all of it, synchronized. Default: local.")
    ] = None,
    shard_optimizer: Annotated[bool, option("Split the optimiser's state over the processes.", "--shard-optimizer")] = False,
    timeout: Annotated[float, option("Seconds to wait for another process before it counts as hanging.")] = 300,
):  # fmt: skip
    """Train a network and keep everything in a folder; with torchrun --nproc-per-node N -m fastff.cli train on several devices."""
    given = {key: value for key, value in locals().items() if key in experiment.DEFAULTS}
    where = experiment.device_named(device)
    distributed = None
    if parallel.world_size() > 1:
        distributed = parallel.Distributed(
            block_ranks=block_ranks, batch_norm=batch_norm or "local", shard_optimizer=shard_optimizer, timeout=timeout
        )
        parallel.start(where, timeout)
        if block_ranks > 1 and window is plan is memory is None:
            given["window"] = 1
    elif block_ranks > 1:
        raise ValueError(f"block_ranks: expected 1 for one process (torchrun starts several), got {block_ranks}")
    whole_number("save_every", save_every)
    if resume is not None and (start_from is not None or out is not None):
        raise ValueError("resume: expected neither --from nor --out beside it; a run goes on in its own folder")
    out = resume or out or Path("runs/train")
    if resume is not None or experiment.restarted(out):
        run = experiment.resume(out, where, distributed, **given)
    elif (out / "checkpoint.pt").exists():
        text = f"expected a new folder, {out} holds a run already; go on with --resume {out}, or remove it"
        raise ValueError(f"out: {text}")
    else:
        run = experiment.start(experiment.settings(**given), where, start_from, distributed)
    _finish(run, out, save_every, distributed)


def _finish(run, out, save_every, distributed):
    """Train to the end of the run, and say what came out."""
    leads, trainer = run.trainer.ranks.leads, run.trainer
    trainer.ranks.watch.on_terminate()
    if leads:
        experiment.writable_folder(out)
        say(repr(trainer.sff))
        if distributed is not None:
            say(str(trainer.engine.place))
        if run.finished:
            say(f"all {run.settings['epochs']} epochs are done; --epochs can add more")
    history = run.fit(out, save_every)
    if distributed is not None:
        torch.distributed.destroy_process_group()
    if not leads:
        return
    last = history[-1]
    blocks = [value for name, value in last.items() if name.startswith("test block ")]
    title = f"{run.dataset.name}, test images, after epoch {last['epoch']}"
    show(_accuracies(title, trainer.sff, blocks, last["test vote"]))
    events = ", events for tensorboard --logdir" if (out / "events").is_dir() else ""
    report = page.of_run(run, out / "report.html", say)
    say(f"{out}: checkpoint.pt, metrics.csv{report}{events}")
    say(f"try it: fastff predict {out} IMAGE...")


@command
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a run of fastff train.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    exit_threshold: Annotated[float | None, option("Stop at the first block where the vote so far is this sure (0 to 1).")] = None,
    device: Device = None,
):  # fmt: skip
    """Classify images, with the votes of the blocks."""
    answers = trained.classify(run, images, experiment.device_named(device), exit_threshold)
    shown = table("image", "class", ">confidence", "votes of the blocks")
    for path, answer in zip(images, answers, strict=True):
        counts = collections.Counter(label for _, label, _ in answer.blocks)
        votes = ", ".join(f"{label} {count}" for label, count in counts.most_common())
        shown.add_row(str(path), answer.label, f"{answer.confidence:.1%}", votes or "none: backpropagation")
    show(shown)
    for path, answer in zip(images, answers, strict=True):
        if not answer.blocks or len(images) > 4:
            continue
        shown = table(">block", "ends with", "class", ">confidence", title=str(path) if len(images) > 1 else None)
        for index, (name, label, sure) in enumerate(answer.blocks):
            shown.add_row(str(index), name, label, f"{sure:.1%}")
        show(shown)


@command
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run of fastff train.")],
    data: Annotated[str | None, option(f"{data_sets} Default: that of the run.", "--data")] = None,
    root: Root = None,
    split: Annotated[str, option("test or train.")] = "test",
    exit_threshold: Annotated[float | None, option("Say too what early exit at this confidence (0 to 1) costs.")] = None,
    json_file: Annotated[Path | None, option("Write all figures to this file.", "--json")] = None,
    device: Device = None,
):  # fmt: skip
    """Classify a data set: accuracy of each block and of their vote, confusion matrix."""
    network = trained.load(run, experiment.device_named(device))
    trained.check_threshold(exit_threshold, network.backprop)
    if json_file is not None:
        _writable_file(json_file)
    title, images, labels = trained.labelled_images(network, data, root, split)
    found, classes = trained.evaluate(network, images, labels, exit_threshold), network.meta["classes"]
    sff = network.sff
    show(_accuracies(f"{title}: {len(labels):,}", sff, found.blocks, found.accuracy))
    if found.early is not None:
        accuracy, computed = found.early
        say(f"early exit at {exit_threshold:g}: {accuracy:.2%}, {computed:.1f} of {len(sff.blocks)} blocks on average")
    say(f"{len(found.wrong):,} of {len(labels):,} are wrong")
    show(_confusions(found.confusion, classes))
    if json_file is not None:
        names = [sff.blocks[i].name for i in sff.plan.voters] if found.blocks else []
        result = {
            "data": title, "images": len(labels), "accuracy": found.accuracy, "blocks": found.blocks, "block_names": names,
            "classes": classes, "confusion": found.confusion.tolist(), "exit_threshold": exit_threshold, "early": found.early,
        }  # fmt: skip
        _write_json(json_file, result)


def _confusions(confusion, classes):
    """Return the confusion matrix as a table, or of many classes the most frequent confusions."""
    if len(classes) <= 12:
        shown = table(
            "class", *(f">{name[:7]}" for name in classes), ">right", title="Rows: the class. Columns: the answer."
        )
        for i, row in enumerate(confusion.tolist()):
            cells = (str(n) if n else "·" for n in row)
            shown.add_row(classes[i], *cells, f"{row[i] / sum(row):.1%}" if sum(row) else "no image")
        return shown
    shown = table("class", "answer", ">images", ">of the class", title="The most frequent confusions")
    wrong, of_class = confusion.clone().fill_diagonal_(0), confusion.sum(1)
    for count, place in zip(*(t.tolist() for t in wrong.flatten().topk(15)), strict=True):
        if count:
            i, j = divmod(place, len(classes))
            shown.add_row(classes[i], classes[j], str(count), f"{count / int(of_class[i]):.1%}")
    return shown


@command
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run of fastff train.")],
    form: Annotated[str, option("torch (torch.export, .pt2) or onnx.", "--format")] = "torch",
    out: Annotated[Path | None, option("Folder for the files. Default: that of the run.")] = None,
    stages: Annotated[bool, option("A file for each block, for early exit.", "--stages")] = False,
):
    """Write the network as a program that runs without fastff, and check that it computes the same."""
    check_member("format", form, exporting.FORMATS)  # before anything is loaded
    network, out = trained.load(run), experiment.writable_folder(out or run)
    paths, worst = exporting.export(network, out, form, stages)
    shape = ", ".join(map(str, network.meta["input_shape"]))
    for path in paths:
        say(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    say(
        f"takes float32 images [B, {shape}] in 0..1 for any B, gives probabilities of {network.meta['num_classes']} classes"
    )
    if stages:
        say("each file takes what the one before returned: the vote so far, and the block's output")
    say(f"checked with batches of {', '.join(map(str, exporting.BATCHES))}: the largest difference is {worst:.1e}")


@command
def bench(
    tune: Annotated[bool, option("Measure what is chosen by measurement first, and keep it.", "--tune")] = False,
    rounds: Annotated[int, option("Number of timings of each kernel.")] = 9,
    device: Device = None,
):
    """Time the kernels against eager PyTorch on this machine."""
    whole_number("rounds", rounds)
    where = experiment.device_named(device)
    if tune:
        benchmark.tune(where, say)
    columns = ("op", "B, C, H = W, K", "runs as", ">faster than eager", ">20 to 80 %", ">milliseconds")
    shown = table(*columns, title=f"{here.environment(where)['device']}, torch {torch.__version__}")
    for row in benchmark.run(where, rounds):
        cells = (row.op, row.shape.strip("()"), row.implementation, f"{row.speedup:.2f} x")
        shown.add_row(*cells, f"{row.low:.2f} to {row.high:.2f}", f"{row.milliseconds:.3f}")
    show(shown)


@command
def info():
    """Show versions, and which implementations run on this machine and why."""
    factor, source = plan.second_moment_factor()
    if source == "default":
        source = f"default; bench --tune measures it here and keeps it in {cache.file(plan.FILE)}"
    lines = {"second moment": f"counted cost times {factor:.2f} ({source})", "Triton sizes": here.tuned_sizes()}
    for name, value in (here.versions() | lines).items():
        say(f"{name:17} {value}")
    shown = table("op", "implementation", "on", "here", title="Implementations, in the order they are tried")
    before = None
    for op, *row in here.implementations():
        shown.add_row("" if op == before else op, *row)
        before = op
    show(shown)
