"""Writes one self-contained HTML page for a run of `fastff train` or `fastff compare`: everything on it is inside the file."""

import base64
import io
from pathlib import Path

from fastff.app import experiment, plots, trained
from fastff.app.environment import environment
from fastff.memory import by_block
from fastff.training.checkpoint import write_atomically
from fastff.training.readers import optional

SHOWN = 24  # images that were classified wrongly


def of_run(run, path, say):
    """Write the page of an experiment.Run that has been trained. Returns ", report.html", or "" where it cannot be made.

    say: function that prints one line of text."""
    try:
        for package in ("jinja2", "matplotlib", "PIL"):
            optional(package, f"no {path.name}: it")
    except ImportError as error:
        say(str(error))
        return ""
    trainer, s, history = run.trainer, run.settings, run.trainer.history
    network = trained.Trained(trainer.sff.eval(), experiment.describe(s, run.dataset), trainer.device)
    found = trained.evaluate(network, run.dataset.test_images, run.dataset.test_labels)
    blocks = [] if network.backprop else [block.name for block in trainer.sff.blocks]
    curve, visits = by_block(*experiment.trained_twice(s | {"compile": False}, run.dataset, trainer.device))
    title = f"{s['model']} of width {s['width']} on {run.dataset.name}"
    how = "by backpropagation" if network.backprop else f"in {len(blocks)} blocks"
    seconds = sum(row["seconds"] for row in history)
    result = (
        f"Trained {how} for {history[-1]['epoch']} epochs, {seconds:.1f} seconds. Of {len(run.dataset.test_labels):,} test images, "
        f"{found.accuracy:.2%} are classified correctly{' by the vote of the blocks' if blocks else ''}."
    )
    curves = "Each line is a block that has a loss: dark is the first, light the last. " if blocks else ""
    sections = [
        {"text": result},
        {
            "title": "Learning", "text": f"{curves}Loss and accuracy in training are means over an epoch, while the weights change.",
            "figure": plots.learning(history, trainer.names), "alt": f"Loss and accuracy over {len(history)} epochs",
        },
        _table_of_blocks(blocks, found, trainer.sff, curve, visits),
        {
            "title": "Memory over one training step", "text": _memory_text(blocks, s),
            "figure": plots.step_memory(curve, visits, blocks), "alt": f"Memory of a step, at most {max(v for _, v in curve):.1f} MiB",
        },
        *_mistakes(found, run.dataset),
        _facts("Settings", s),
        _facts("Environment", environment(trainer.device)),
    ]  # fmt: skip
    write(path, title, sections)
    return f", {path.name}"


def of_comparison(result, figure, path):
    """Write the page of a comparison: the result of fastff.app.compare.compare, and its picture as SVG."""
    s = result["settings"]
    rows = [
        (plots.STYLES[run["mode"]][0], f"{run['test_accuracy']:.2%}", f"{run['train_accuracy']:.2%}",
         f"{run['seconds_per_epoch']:.2f}", f"{run['peak_memory_mb']:.1f}")
        for run in result["runs"]
    ]  # fmt: skip
    columns = ("trained", "test accuracy", "training accuracy", "seconds an epoch", "peak memory of a step, MiB")
    text = "The same network, weights and batches in every row. Memory is above that of parameters and optimizer state."
    alt = ", ".join(f"{row[0]}: {row[1]} of the test images are right" for row in rows)
    sections = [{"text": text, "columns": columns, "rows": rows}, {"title": "Pictures", "figure": figure, "alt": alt}]
    for run in result["runs"]:
        if run["blocks"]:
            rows = [(name, f"{accuracy:.2%}") for name, accuracy in zip(run["block_names"], run["blocks"], strict=True)]
            title = f"Blocks that vote, trained {plots.STYLES[run['mode']][0]}"
            sections.append({"title": title, "columns": ("block", "test accuracy"), "rows": rows})
    common = s | {"mode": None, "granularity": None}  # which the rows differ in
    sections += [_facts("Settings", common), _facts("Environment", result["environment"])]
    write(path, f"{s['model']} of width {s['width']} on {Path(s['data']).name}, trained in several ways", sections)


def write(path, title, sections):
    """Write the page: page.html filled with the sections. Texts in it are escaped."""
    environment = optional("jinja2", "the page").Environment(autoescape=True)
    environment.filters["b64"] = lambda content: base64.b64encode(content).decode()
    template = environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    text = template.render(title=title, sections=sections)
    write_atomically(path, lambda file: file.write(text.encode()))


def _table_of_blocks(names, found, sff, curve, visits):
    """Return the section with a row for each block; of backpropagation an empty one."""
    ends = [*(time for time, _ in visits[1:]), float("inf")]
    peaks = dict.fromkeys(range(len(names)), 0.0)
    for (start, index), end in zip(visits, ends, strict=False):
        peaks[index] = max(peaks[index], max((v for t, v in curve if start <= t < end), default=0.0))
    right = {i: f"{accuracy:.2%}" for i, accuracy in zip(sff.plan.voters, found.blocks, strict=True)} if names else {}
    rows = [
        (i, name, f"{sum(p.numel() for p in sff.learned_parameters(i)):,}", right.get(i, "no loss"), f"{peaks[i]:.1f}")
        for i, name in enumerate(names)
    ]
    columns = ("block", "ends with", "parameters", "test accuracy", "peak memory, MiB")
    return {"title": "Blocks", "columns": columns, "rows": rows, "kind": "blocks"} if rows else {}


def _memory_text(names, s):
    text = "What the step had allocated above the parameters, the optimizer's state and the minibatch, on a new network of the same settings"
    text += f" with {s['batch_size']} images."
    return text + (" A block's memory is freed when the last loss that trains it has been computed." if names else "")


def _mistakes(found, dataset):
    """Return the sections of the confusion matrix and of the images that were classified wrongly."""
    total, classes = len(dataset.test_labels), dataset.classes
    text = f"{len(found.wrong):,} of {total:,} test images are classified wrongly."
    if found.wrong:
        text += f" {'The' if len(found.wrong) > SHOWN else 'All'} {min(SHOWN, len(found.wrong))}"
        text += " of which the network is surest:" if len(found.wrong) > SHOWN else " of them, the surest first:"
    images = []
    for index, given, sure in found.wrong[:SHOWN]:
        truth, answer = classes[int(dataset.test_labels[index])], classes[given]
        caption = f"{truth}, taken for {answer} ({sure:.0%})"
        images.append({"png": _png(dataset.test_images[index]), "alt": f"test image {index}", "text": caption})
    sections = [{"title": "Images it got wrong", "text": text, "images": images}]
    if len(classes) <= 30:
        counts = found.confusion.tolist()
        most = max(1, int(found.confusion.clone().fill_diagonal_(0).max()))
        rows = [
            (name, *(_cell(n, i == j, most) for j, n in enumerate(row)))
            for i, (name, row) in enumerate(zip(classes, counts, strict=True))
        ]
        text = "Rows are the classes of the test images, columns the answers."
        sections.append(
            {"title": "Confusion matrix", "text": text, "columns": ("", *classes), "rows": rows, "kind": "matrix"}
        )
    return sections


def _cell(count, right, most):
    if right:
        return {"text": count, "shade": "#e4f0e4"}
    return {"text": count, "shade": f"rgb(213 94 0 / {0.1 + 0.6 * count / most:.2f})"} if count else "·"


def _png(image):
    """Return a uint8 image [C, H, W] as a PNG file; of other numbers of channels than 1 and 3 the first."""
    pixels = image.permute(1, 2, 0) if len(image) == 3 else image[0]
    file = io.BytesIO()
    optional("PIL.Image", "the page").fromarray(pixels.contiguous().numpy()).save(file, "PNG")
    return file.getvalue()


def _facts(title, values):
    rows = [(name.replace("_", " "), str(value)) for name, value in values.items() if value is not None]
    return {"title": title, "rows": rows, "kind": "text"}
