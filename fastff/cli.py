"""The command line: compare, train, predict, info. Logic lives in fastff/training; here are arguments, tables and exit codes."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import torch

import fastff


def main():
    """Entry point. Bad input: one clear line, exit code 2. Ctrl-C: 130. A loss that diverged: 1."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        sys.exit('the command line needs typer and rich: pip install "fastff[train]"')
    from fastff.training.loop import Diverged

    try:
        _app()(standalone_mode=True)
    except Diverged as error:
        _fail(error, 1)
    except KeyboardInterrupt as error:
        _fail(str(error) or "stopped", 130)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        _fail(error, 2)


def _fail(error, code):
    print(f"fastff: {error}", file=sys.stderr)
    sys.exit(code)


def _device(name):
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected one that works here such as cpu or cuda, got {name!r} ({str(error).splitlines()[0]})") from error
    return device


def _app():
    import typer
    from rich.console import Console
    from rich.table import Table

    from fastff.training import checkpoint, experiment
    from fastff.training import compare as comparison
    from fastff.training.data import read_image

    app = typer.Typer(help=fastff.__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    console = Console()
    Data = Annotated[Optional[str], typer.Option("--data", help="digits, mnist, fashion-mnist, cifar10, cifar100, imagenette, or a folder of images by class.")]  # noqa: N806
    Root = Annotated[Optional[str], typer.Option(help="Folder with the data set's official files; nothing is downloaded then.")]  # noqa: N806
    Model = Annotated[Optional[str], typer.Option(help=f"One of {', '.join(experiment.MODELS)}.")]  # noqa: N806
    Width = Annotated[Optional[int], typer.Option(help="Channels of a ResNet's first stage.")]  # noqa: N806
    Epochs = Annotated[Optional[int], typer.Option()]  # noqa: N806
    Batch = Annotated[Optional[int], typer.Option("--batch-size")]  # noqa: N806
    Lr = Annotated[Optional[float], typer.Option(help="Default: 4e-3 block by block, 2e-3 for backpropagation.")]  # noqa: N806
    Subset = Annotated[Optional[int], typer.Option(help="Train on this many images, equally many of each class.")]  # noqa: N806
    Seed = Annotated[Optional[int], typer.Option()]  # noqa: N806
    Device = Annotated[Optional[str], typer.Option(help="cpu or cuda; default: cuda where there is one.")]  # noqa: N806
    Window = Annotated[Optional[int], typer.Option(help="Blocks that a local loss trains: its own and those before; 1 is the paper's.")]  # noqa: N806
    Grid = Annotated[Optional[int], typer.Option(help="Cells on a side of the spatial term; 0 is the paper's.")]  # noqa: N806

    @app.command()
    def compare(
        data: Data = None, root: Root = None, model: Model = None, width: Width = None, epochs: Epochs = None, batch_size: Batch = None, lr: Lr = None,
        subset: Subset = None, seed: Seed = None, device: Device = None, window: Window = None, grid: Grid = None,
        modes: Annotated[str, typer.Option(help="Out of backprop, block, layer, stage.")] = "backprop,block,layer",
        out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("runs/compare"),
        json_file: Annotated[Optional[Path], typer.Option("--json", help="Write all figures to this file.")] = None,
    ):  # fmt: skip
        """Train one network by backpropagation, block-wise and layer-wise: table, plots, JSON."""
        chosen = experiment.settings(
            data=data, root=root, model=model, width=width, epochs=epochs, batch_size=batch_size, lr=lr, subset=subset, seed=seed, window=window, grid=grid
        )
        names = [name.strip() for name in modes.split(",")]
        if not names or any(name not in experiment.MODES for name in names):
            raise ValueError(f"modes: expected names out of {', '.join(experiment.MODES)} separated by commas, got {modes!r}")
        result = comparison.compare(chosen, names, _device(device), say=lambda text: console.print(text, highlight=False))
        comparison.picture(result, out / "compare.png")
        console.print(comparison.table(result["runs"]))
        console.print(f"picture: {out / 'compare.png'}", highlight=False, soft_wrap=True)
        if json_file is not None:
            checkpoint.write_atomically(json_file, lambda file: file.write(json.dumps(result, indent=1).encode()))
            console.print(f"figures: {json_file}", highlight=False, soft_wrap=True)

    @app.command()
    def train(
        data: Data = None, root: Root = None, model: Model = None, width: Width = None, epochs: Epochs = None, batch_size: Batch = None, lr: Lr = None,
        subset: Subset = None, seed: Seed = None, device: Device = None, window: Window = None, grid: Grid = None,
        granularity: Annotated[Optional[str], typer.Option(help="layer, block, stage, model, or module paths that end blocks, with commas.")] = None,
        mode: Annotated[Optional[str], typer.Option(help="sff or backprop.")] = None,
        out: Annotated[Path, typer.Option(help="Folder for checkpoint, metrics.csv and TensorBoard events.")] = Path("runs/train"),
        resume: Annotated[Optional[Path], typer.Option(help="Go on with the run in this folder.")] = None,
        start_from: Annotated[Optional[Path], typer.Option("--from", help="Start with the blocks of another run (transfer).")] = None,
        freeze: Annotated[Optional[int], typer.Option(help="First blocks that are not trained.")] = None,
        weight_decay: Annotated[Optional[float], typer.Option()] = None,
        amp: Annotated[Optional[str], typer.Option(help="bf16 or fp16.")] = None,
        schedule: Annotated[Optional[str], typer.Option(help="all: every block in every minibatch; greedy: one after the other.")] = None,
        micro_batches: Annotated[Optional[int], typer.Option(help="Parts a minibatch is cut into.")] = None,
        clip: Annotated[Optional[float], typer.Option(help="Greatest norm of a block's gradients.")] = None,
        compile: Annotated[Optional[bool], typer.Option(help="Run blocks through torch.compile.")] = None,
        channels_last: Annotated[Optional[bool], typer.Option("--channels-last/--contiguous")] = None,
        image_size: Annotated[Optional[int], typer.Option(help="Of images from folders and Imagenette.")] = None,
        save_every: Annotated[Optional[int], typer.Option(help="Steps between checkpoints, beside one an epoch.")] = 200,
    ):  # fmt: skip
        """Train a network block by block (or by backpropagation) and keep everything in a folder."""
        where = _device(device)
        if resume is not None:
            _, meta = experiment.read_run(resume, where)
            chosen, out = meta["settings"] | ({"epochs": epochs} if epochs else {}) | ({"root": root} if root else {}), resume
        else:
            if (out / "checkpoint.pt").exists():
                raise ValueError(f"out: expected a new folder, {out} holds a run already; continue it with --resume {out}")
            chosen = experiment.settings(
                data=data, root=root, model=model, width=width, epochs=epochs, batch_size=batch_size, lr=lr, subset=subset, seed=seed, window=window,
                grid=grid, granularity=granularity, mode=mode, freeze=freeze, weight_decay=weight_decay, amp=amp, schedule=schedule,
                micro_batches=micro_batches, clip=clip, compile=compile, channels_last=channels_last, image_size=image_size,
            )  # fmt: skip
        dataset = experiment.load_data(chosen)
        sff = experiment.build_network(chosen, dataset.num_classes, dataset.input_shape, where)
        if start_from is not None:
            experiment.transfer(sff, start_from)
        trainer = experiment.build_trainer(chosen, sff)
        if resume is not None:
            trainer.load(resume / "checkpoint.pt")
        console.print(str(sff), highlight=False)
        batches, test = experiment.loaders(chosen, dataset, where)
        trainer.fit(batches, chosen["epochs"], validation=test, out=out, save_every=save_every, meta=experiment.describe(chosen, dataset))
        shown = Table(title=f"{chosen['data']}, {chosen['epochs']} epochs")
        shown.add_column("block")
        shown.add_column("test accuracy", justify="right")
        for name, accuracy in trainer.evaluate(test).items():
            index = int(name.split()[1]) if name.startswith("block ") else None
            shown.add_row(name if index is None else f"{index}  {trainer.names[index]}", f"{accuracy:.2%}")
        console.print(shown)
        console.print(f"checkpoint.pt, metrics.csv and TensorBoard events are in {out}", highlight=False, soft_wrap=True)

    @app.command()
    def predict(
        run: Annotated[Path, typer.Argument(help="Folder of a run.")],
        images: Annotated[list[Path], typer.Argument(help="Image files.")],
        exit_threshold: Annotated[Optional[float], typer.Option(help="Leave at the first block whose vote is this sure.")] = None,
        device: Device = None,
    ):  # fmt: skip
        """Classes of images, with the votes of the blocks."""
        where = _device(device)
        state, meta = experiment.read_run(run, where)
        sff = experiment.build_network(meta["settings"], meta["num_classes"], tuple(meta["input_shape"]), where)
        target = sff if any(key.startswith("heads.") for key in state["module"]) else sff.model
        target.load_state_dict(state["module"])
        sff.eval()
        channels, size = meta["input_shape"][0], meta["input_shape"][1]
        mean, std = (torch.tensor(meta[key], device=where).view(-1, 1, 1) for key in ("mean", "std"))
        batch = torch.stack([(read_image(path, size, channels).to(where).float() / 255 - mean) / std for path in images])
        classes = meta["classes"]
        shown = Table()
        for name in ("image", "class", "confidence", "votes of the blocks"):
            shown.add_column(name, justify="right" if name == "confidence" else "left")
        with torch.no_grad():
            if meta["settings"]["mode"] == "backprop":
                sure, best = sff.model(batch).softmax(1).max(1)
                rows = [(best[i], sure[i], "backpropagation has none") for i in range(len(images))]
            else:
                found = sff.predict(batch, exit_threshold)
                votes = [g.argmax(1) for g in sff.goodness(batch)]
                rows = [
                    (found.label[i], found.confidence[i], " ".join(classes[v[i]] for v in votes[: found.block[i] + 1])) for i in range(len(images))
                ]
        for path, (label, confidence, said) in zip(images, rows, strict=True):
            shown.add_row(str(path), classes[label], f"{confidence:.1%}", said)
        console.print(shown)

    @app.command()
    def info(calibrate: Annotated[bool, typer.Option(help="Measure the algorithms of goodness on this machine and keep the result.")] = False):
        """Versions, what was compiled, and which implementation of each op runs here."""
        from fastff.kernels import native
        from fastff.ops import TABLES, plan

        if calibrate:
            console.print(f"calibrated: a multiply-add of the second moment costs {plan.calibrate():.2f} of one of the direct algorithm")
        try:
            import triton

            triton_version = triton.__version__
        except ImportError:
            triton_version = "not installed (nothing here needs it yet)"
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        factor, source = plan.second_moment_factor()
        lines = {
            "fastff": fastff.__version__, "torch": torch.__version__, "triton": triton_version, "python": sys.version.split()[0], "GPU": gpu,
            "CPU": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
            "compiled library": native.reason() or "fastff._C loaded", "FASTFF_IMPL": os.environ.get("FASTFF_IMPL", "not set"),
            "second moment": f"factor {factor:.2f} ({source}; --calibrate measures it into {plan.cache_file()})",
        }  # fmt: skip
        for name, value in lines.items():
            console.print(f"{name:17} {value}", highlight=False, soft_wrap=True)
        shown = Table(title="implementations, in order; auto takes the first that runs")
        for name in ("op", "implementation", "on", "here"):
            shown.add_column(name)
        for op, rows in TABLES.items():
            for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
                taken = False
                for row in rows:
                    why = row.can_run(torch.empty(0, device=device))
                    shown.add_row(op, row.name, device, why or ("runs" if taken else "runs, auto takes it"))
                    taken = taken or why is None
        console.print(shown)
        console.print("kernel sizes 3 and 5 of goodness run as PyTorch's convolutions; everything else as batched matrix products", highlight=False)

    return app


if __name__ == "__main__":
    main()
