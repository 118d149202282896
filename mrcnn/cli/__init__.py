"""The command `mrcnn`: train, evaluate, predict, summary."""

from __future__ import annotations

import sys

import typer

from ..errors import CheckpointError, ConfigError, DataError, GraphError, TrainingStopped
from .evaluate import evaluate
from .predict import predict
from .summary import summary
from .train import train

app = typer.Typer(
    help="Train, evaluate and use a Mask R-CNN whose detection ops are Triton kernels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (train, evaluate, predict, summary):
    app.command()(command)


def main() -> None:
    """Run the command line; an error meant for the user is one line on stderr and exit status 2, a stop 130."""
    try:
        app()
    except TrainingStopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    except (CheckpointError, ConfigError, DataError, GraphError, FloatingPointError, OSError) as error:
        # From a DataLoader's worker the message is a traceback that ends with the sentence.
        sentence = str(error).strip().splitlines()[-1]
        print(f"error: {sentence.removeprefix(f'{DataError.__module__}.DataError: ')}", file=sys.stderr)
        sys.exit(2)
