"""The commands about the small world's frozen parts: train them anew, measure what they reach.
`flows.cli` takes them in; what they do lives in trainers.components."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.console import clear_errors, fail, print_rows, say

app = typer.Typer(no_args_is_help=True, help="Train or measure the small world's frozen parts: VAE, text encoder, captioner, rewards.")
Only = Annotated[list[str] | None, typer.Option("--only", help="One part, e.g. vae or rewards/edit. May be repeated. Default: all.")]


@app.command()
def build(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the parts; what it holds already is kept.")] = Path("parts"),
    only: Only = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Parts trained at a time. Default: one a processor.")] = None,
) -> None:
    """Train the parts from nothing and measure each on held-out scenes. Killed, it goes on with the parts it was at."""
    with clear_errors():
        from flows.engine import go_offline

        go_offline()
        from trainers.components.build import PARTS, build_parts
        from trainers.parallel import processors
        from trainers.settings import ComponentsSettings

        build_parts(output, ComponentsSettings(source="train", seed=seed), only or PARTS, workers or processors())
        say(f"parts: {output}; use them with --set components.source={output.resolve()}")


@app.command()
def measure(
    folder: Annotated[Path | None, typer.Argument(help="A parts folder. Default: the parts of the package.")] = None, only: Only = None
) -> None:
    """Measure parts on held-out scenes and print each number beside what it must reach; exit code 1 where one falls short."""
    with clear_errors():
        from flows.engine import go_offline

        go_offline()
        from trainers.components.build import PACKAGED, PARTS, TARGETS, measure_part

        rows, short = [], []
        for name in only or PARTS:
            if name not in PARTS:
                fail(f"there is no part '{name}': the parts are {', '.join(PARTS)}", 2)
            for metric, value in measure_part(folder or PACKAGED, name).items():
                target = TARGETS[name].get(metric)
                short += [f"{name} {metric}"] if target is not None and value < target else []
                rows.append({"part": name, "metric": metric, "value": round(value, 4), "must reach": "" if target is None else target})
        print_rows(rows, "table")
        if short:
            fail(f"short of what it must reach: {', '.join(short)}", 1)
