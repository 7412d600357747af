"""Cuts models of timm and torchvision that no test names, trains each for one step, and writes a CSV of what came of it.

    python -m benchmarks.any_model --count 60        goes on where the CSV ends; --again makes it anew

A row is a model and a granularity: `trains`; `refused` with a sentence of fastff; or `error`, one of another library, which should not happen.
"""

import argparse
import collections
import csv
import gc
import random
import re
import signal
import traceback
import warnings
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.networks import torchvision

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("library", "model", "size", "granularity", "result", "blocks", "coarser", "message")
LARGE = re.compile(
    "large|huge|giant|xlarge|base|so400|so150|_l$|_b$|101|152|200|_[3-9]?[0-9]gf|128gf|269|288|xxl|enormous|gigantic|_m$|_b[3-9]|_[smlx]_in21"
)
PARAMETERS, SECONDS, CLASSES = 40_000_000, 300, 10


def drawn(count, seed):
    """(library, name) of `count` models of timm that no test names, and of all of torchvision's that are not large."""
    models = torchvision().models  # before timm, which imports it
    import timm

    tested = set(re.findall(r'"(\w+)"', (ROOT / "tests/test_cut_networks.py").read_text()))
    names = [name for name in timm.list_models() if name not in tested and not LARGE.search(name)]
    random.Random(seed).shuffle(names)
    others = [name for name in models.list_models() if name not in tested and not LARGE.search(name)]
    others = [name for name in others if not name.startswith(("quantized_", "raft", "vgg", "vit_", "mvit"))]
    return [("timm", name) for name in names[: 3 * count]], [("torchvision", name) for name in others]


def make(library, name):
    """(the model, the shape of an image)"""
    torch.manual_seed(0)
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(name)
        size = config.input_size[-1] if config.fixed_input_size else max(64, *(config.min_input_size or (0,))[-1:])
        model = timm.create_model(name, num_classes=CLASSES)
        return None if sum(p.numel() for p in model.parameters()) > PARAMETERS else model, (3, size, size)
    models = torchvision().models
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    size = {"inception_v3": 299, "maxvit_t": 224, "s3d": 224}.get(name, 64)
    builder = models.get_model_builder(name)
    if re.search("segmentation|detection", builder.__module__):
        options["weights_backbone"] = None
    video = builder.__module__.startswith("torchvision.models.video")
    return builder(weights=None, num_classes=CLASSES, **options), (3, 16, size, size) if video else (3, size, size)


def tried(model, shape, granularity):
    """The last columns of a row."""
    from fastff import SFF, Trainer

    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        torch.manual_seed(0)
        sff = SFF(model, CLASSES, granularity, shape)
        losses = Trainer(sff).step(torch.randn(4, *shape), torch.arange(4))
        if not torch.isfinite(losses).all():
            return "error", len(sff.blocks), "", f"losses {losses.tolist()}"
        coarser = max([1, *(len(block.holds) for block in sff.blocks)])
        return "trains", len(sff.blocks), coarser if coarser > 1 else "", ""
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = f"{Path(place.filename).parent}/".startswith(f"{ROOT / 'fastff'}/")
        says = re.sub(r"\S*/site-packages/", "", " ".join((str(error) or "no message").split()))
        return "refused" if ours else "error", "", "", f"{type(error).__name__}: {says}"[:600]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def too_long(*_):
    raise TimeoutError(f"more than {SECONDS} seconds of a processor")


def sentence():
    """Return the sentences of README.md on the models that were tried."""
    if not (rows := tables.read("any_model")):
        return tables.missing("python -m benchmarks.any_model")
    counts = collections.Counter((row["granularity"], row["result"]) for row in rows)
    models = len({(row["library"], row["model"]) for row in rows})
    trains, refused, failed = (counts["block", result] for result in ("trains", "refused", "error"))
    return (
        f"Of {models} models of timm and torchvision that no test names, {trains} are cut into their blocks and train (by layer "
        f"{counts['layer', 'trains']}),\n{refused} are refused with a sentence that says where and why, and {failed or 'none'} "
        f"{'fail' if failed > 1 else 'fails'} in another way."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="models of timm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/any_model.csv")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", default="", help="a regular expression for names")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, too_long)
    rows = []
    if options.csv.exists() and not options.again:
        with options.csv.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["library"], row["model"], row["granularity"]) for row in rows}
    with options.csv.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        for library, names in zip(("timm", "torchvision"), drawn(options.count, options.seed), strict=True):
            used = 0
            for _, name in names:
                if library == "timm" and used == options.count:
                    break
                if not re.search(options.only, name):
                    continue
                for granularity in ("block", "layer"):
                    if (library, name, granularity) in done:
                        used += granularity == "block"
                        continue
                    try:
                        model, shape = make(library, name)
                    except Exception as error:  # of the library: with these options there is no such model
                        print(f"{name}: not made: {error}"[:200], flush=True)
                        break
                    if model is None:
                        break
                    used += granularity == "block"
                    row = [library, name, shape[-1], granularity, *tried(model, shape, granularity)]
                    table.writerow(dict(zip(COLUMNS, row, strict=True)))
                    file.flush()
                    print(*row, flush=True)
                    del model
                    gc.collect()
    with options.csv.open(newline="") as file:
        counts = collections.Counter((row["granularity"], row["result"]) for row in csv.DictReader(file))
    for (granularity, result), count in sorted(counts.items()):
        print(f"{granularity}: {count} {result}")


if __name__ == "__main__":
    main()
