"""`mrcnn summary`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from ..config import CONFIGS, load_config, validate
from ..summary import parse_image_size, summarize, summary_table
from .common import FROM_CONFIG


def summary(
    config: Annotated[str, typer.Option(help=f"{', '.join(CONFIGS)}, or a .toml or .json file.")] = "torchvision",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value; may be repeated.")
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", show_default=FROM_CONFIG, help="As in 800x1344; 800 is a square."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Images.")] = 1,
    training: Annotated[bool, typer.Option("--training/--inference", help="Losses or detections.")] = True,
    objects: Annotated[int, typer.Option(min=1, help="Ground-truth slots an image.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Show every stage's tensors, parameters and FLOPs, for any configuration and size, without computing."""
    resolved = validate(load_config(config, set_ or []))
    size = parse_image_size(image_size or str(resolved.data.image_size or 800))
    found = summarize(resolved, size, batch, training, objects)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:  # a file has no width: the table's own
            console.width = max(console.width, 100)
        console.print(summary_table(found))
