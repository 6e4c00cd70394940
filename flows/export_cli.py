"""The commands about bundles: check one, and measure what the full-size network costs to export.
`flows.cli` takes them in; what they do lives in trainers.export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.console import clear_errors, fail, print_rows, say

app = typer.Typer()


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory, e.g. what `dreamlite export` printed.", exists=True, file_okay=False)],
    static: Annotated[bool, typer.Option("--static", help="Hashes, fields, shapes and sigmas alone; runs no graph.")] = False,
    threads: Annotated[int, typer.Option(help="ONNX Runtime threads.", min=1)] = 1,
) -> None:
    """Check a bundle: hashes, shapes, sigmas, each graph and the whole loop against torch's samples; time and memory per part."""
    with clear_errors():
        from trainers.export.rerun import inspect_bundle
        from trainers.export.verify import check_bundle, read_manifest

        try:
            checks = list(check_bundle(bundle, read_manifest(bundle))) if static else inspect_bundle(bundle, threads)
        except ValueError as error:  # no manifest, or one of another version
            fail(str(error), 2)
        print_rows(
            [{"part": item.part, "check": item.what, "value": item.value, "limit": item.limit, "result": item.result} for item in checks],
            "table",
        )
        problems = [item.problem for item in checks if not item.ok]
        if problems:
            fail("\n".join(problems), 1)


@app.command("export-size")
def export_size(
    folder: Annotated[Path, typer.Option("--folder", help="Where the graphs are written: some 3 GB.")] = Path("full-size"),
    size_px: Annotated[int, typer.Option(help="Side of a panel; its latent is an eighth.", min=64)] = 512,
    variant: Annotated[list[str] | None, typer.Option("--variant", help="fp16, int8 or int4 beside fp32. May be repeated. Default: all.")] = None,
) -> None:
    """Export the 0.39 B network with random weights: megabytes against their limits, seconds, memory, one call beside torch.

    For a nightly job: all graphs take some ten minutes of one core; int8 takes 17 GB of memory, the others up to 8.2 GB.
    """
    with clear_errors():
        from typing import get_args

        from trainers.export.full_size import measure_full_size
        from trainers.export.settings import Variant

        known = get_args(Variant)
        for name in variant or ():
            if name not in known:
                fail(f"there is no variant '{name}': there are {', '.join(known)}", 2)
        try:
            rows = measure_full_size(folder, size_px, variant or known, say)
        except ValueError as error:  # a stage that memory ended, or a UNet of another size
            fail(str(error), 1)
        print_rows(rows, "table")
        short = [f"{row['graph']} {row['variant']}" for row in rows if not row["ok"]]
        if short:
            fail(f"too large, or too far from torch: {', '.join(short)}", 1)
