"""Entry point of the command line; app/commands.py has the commands, and needs typer and rich (the extra `train`)."""

import os
import sys


def main():
    """Run the command line. Exit codes: 2 bad input, 1 a loss that diverged or too little memory, 130 Ctrl-C, 143 SIGTERM; with a message."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # of a process that nobody looks at, as with pythonw
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  open until the process ends
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(f'fastff: the command line needs typer and rich ({error}): pip install "fastff[train]"')
    from fastff.app.commands import app

    try:
        app()
    except KeyboardInterrupt:  # outside of a command
        sys.exit(130)


if __name__ == "__main__":
    main()
