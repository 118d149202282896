"""The command `mrcnn-bench resources`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..command_line import fail

if TYPE_CHECKING:
    from rich.table import Table

    from .row import Row


def resources(
    targets: Annotated[str, typer.Option(help="GPUs to compile for, separated by commas.")] = (
        "sm_80,sm_90,sm_100,gfx942"
    ),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the committed tables.")] = Path(
        "reports/resources"
    ),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 where it got worse.")] = False,
) -> None:
    """Compile every kernel, no GPU needed, and table its registers, spills, vector loads and occupancy.

    Takes a minute or two. Writes the table of the installed Triton version.
    """
    from rich.console import Console

    from .gate import check_resources
    from .table import read_tables, write_table

    try:  # before compiling, and before the table is overwritten by what is compared with it
        committed = read_tables(output)
    except ValueError as error:
        fail(f"a table in {output} is not valid JSON ({error})")
    if check and not committed:
        fail(f"there is no table in {output} to compare with: run this in a checkout, or without --check first")
    version, rows = _measure(targets)
    Console().print(_table(rows, version))
    wrong = check_resources(rows, committed, version)
    for sentence in wrong:
        typer.echo(f"worse: {sentence}", err=True)
    if not wrong:
        typer.echo(f"nothing is worse than in the tables of Triton {', '.join(committed) or '(none yet)'}")
    if check:
        raise typer.Exit(1 if wrong else 0)
    try:
        for path in write_table(output, version, rows):
            typer.echo(f"wrote {path}")
    except OSError as error:
        fail(f"{output} cannot be written: {error.strerror}")


def _measure(targets: str) -> tuple[str, list[Row]]:
    from importlib.metadata import PackageNotFoundError, version

    from .measure import TARGETS, measure_resources

    chosen = targets.split(",")
    if unknown := [target for target in chosen if target not in TARGETS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(TARGETS)}", param_hint="--targets")
    try:
        return version("triton"), measure_resources(chosen)
    except PackageNotFoundError:
        fail("the triton package is not installed, and it is what compiles")
    except RuntimeError as error:
        fail(str(error))


def _table(rows: list[Row], version: str) -> Table:
    """A line a kernel and a column a target; the committed page has the rest."""
    from rich.table import Table

    targets = list(dict.fromkeys(row.target for row in rows))
    never_run = "; gfx942 is compiled, never run" if "gfx942" in targets else ""
    table = Table(title=f"Registers a thread, theoretical occupancy; Triton {version}", caption=f"! spills{never_run}")
    table.add_column("call and kernels")
    for target in targets:
        table.add_column(target, justify="right", no_wrap=True)
    found = {row.key: row for row in rows}
    for call in dict.fromkeys(row.call for row in rows):
        table.add_section()
        table.add_row(f"[bold]{call}")
        for kernel in dict.fromkeys(row.kernel for row in rows if row.call == call):
            name = kernel.replace("_kernel", "")
            table.add_row(f"  {name}", *(_cell(found.get((target, call, kernel))) for target in targets))
    return table


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"  # for this target, both launches of the call have the same code
    text = f"{row.assembly.registers} {row.occupancy:3d}%"
    return f"[red]{text}![/]" if row.assembly.spills else f"{text} "
