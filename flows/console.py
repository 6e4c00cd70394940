"""What every command has in common: plain lines, tables, and errors as one sentence with an exit code.
Heavy libraries load inside the functions, so that help, query and status answer at once."""

from __future__ import annotations

import csv
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    import pyarrow as pa

    from dreamlite_data.lake import Lake

LakeFolder = Annotated[
    Path, typer.Option("--lake", "-l", envvar="DREAMLITE_LAKE", help="Folder of the lake: all data, runs, checkpoints and reports.")
]
DEFAULT_LAKE = Path("lake")


def say(text: str) -> None:
    """A line of the command's answer."""
    typer.echo(text)


def warn(text: str) -> None:
    """A line beside the answer, for a person."""
    typer.secho(f"warning: {text}", fg=typer.colors.YELLOW, err=True)


@contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can mend is shown as its sentence, with exit code 2 (asked wrongly) or 1 (failed); the rest as a traceback."""
    from dreamlite_data.lake import LakeError
    from flows.config import ConfigError
    from flows.gates import GateFailed
    from flows.server import ServerError
    from flows.step import StepFailed

    try:
        yield
    except (ConfigError, LakeError, ServerError) as error:
        fail(str(error), 2)
    except GateFailed as error:
        fail(str(error), 1)
    except StepFailed as error:
        if os.environ.get("DREAMLITE_TRACEBACK"):
            traceback.print_exception(error.__cause__)
        fail(f"{error}\nIts files are in {error.directory}. Run the same command again to go on from there; "
              "DREAMLITE_TRACEBACK=1 shows where in the code it happened.", 1)  # fmt: skip
    except OSError as error:
        if error.filename is None or os.environ.get("DREAMLITE_TRACEBACK"):
            raise
        fail(f"{error.filename}: {error.strerror}; DREAMLITE_TRACEBACK=1 shows where in the code it happened", 2)
    except KeyboardInterrupt:
        fail("stopped; finished steps are kept, run the same command again to go on", 130)


def fail(text: str, code: int) -> NoReturn:
    """End the command with `text` as its error and the exit code."""
    typer.secho(f"error: {text}", fg=typer.colors.RED, err=True)
    raise typer.Exit(code)


def open_lake(lake: Path) -> Lake:
    """The lake, read-only; one that is not there is an error."""
    from dreamlite_data.lake import Lake

    return Lake(lake, read_only=True)


def print_arrow(answer: pa.Table, format_: str) -> None:
    """A table of the lake as 'table', 'csv' or 'json'."""
    if format_ == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.column_names)
        writer.writerows([_cell(row[name]) for name in answer.column_names] for row in answer.to_pylist())
    else:
        print_rows(answer.to_pylist(), format_, answer.column_names)


def _cell(value: Any) -> Any:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else "" if value is None else value


def print_rows(rows: list[dict[str, Any]], format_: str, names: list[str] | None = None) -> None:
    """Dicts of one shape as 'table' or 'json'; `names` heads a table without rows."""
    if format_ == "json":
        json.dump(rows, sys.stdout, indent=1, default=lambda value: _cell(value) if isinstance(value, bytes) else str(value))
        sys.stdout.write("\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names or (list(rows[0]) if rows else []):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(_cell(value)) for value in row.values()))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table, markup=False)
