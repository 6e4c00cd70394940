"""The commands about reward models: score rows, check a checkpoint, measure agreement with people, plan memory and time.
`flows.cli` takes them in; what they do lives in dreamlite_data.rewards."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.console import fail, print_rows, say, warn

if TYPE_CHECKING:
    import torch

    from dreamlite_data.rewards import RewardModel
    from dreamlite_data.rewards.rows import RewardInput

rewards = typer.Typer(no_args_is_help=True, help="HPSv3 and EditReward: score rows, check a checkpoint, measure it on pairs that people judged.")


class Kind(StrEnum):
    """The two kinds of reward model."""

    hpsv3 = "hpsv3"
    editreward = "editreward"


class Format(StrEnum):
    """How an answer is written."""

    table = "table"
    json = "json"


KindOfModel = Annotated[Kind, typer.Argument(help="hpsv3 scores images against prompts, editreward edits against instructions.")]
Model = Annotated[str, typer.Argument(metavar="MODEL_DIR", help="Directory of the checkpoint, or a hub id org/name@revision.")]
Base = Annotated[
    str | None, typer.Option(help="Base model (directory or org/name@revision) that lends config and tokenizer to a hub model without.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N. auto: the first GPU, or else the CPU.")]
Dtype = Annotated[str, typer.Option(help="Of the backbone: auto, float32, bfloat16 or float16. auto: bfloat16 on a GPU or in 4 bits.")]
FourBit = Annotated[bool, typer.Option("--four-bit", help="Decoder in 4-bit NF4 (extra 'four-bit'): a 7 B model in about 6 GB.")]
BatchRows = Annotated[int, typer.Option(min=1, max=4096, help="Rows in memory at a time; scoring cuts them further by tokens.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print what it will take in memory and time; loads and scores nothing.")]
Utilisation = Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of a GPU's peak that --dry-run counts on.")]
AnswerFormat = Annotated[Format, typer.Option("--format", "-f", help="table or json.")]


@contextmanager
def _clear_errors() -> Iterator[None]:
    from transformers.utils import logging

    from dreamlite_data.rewards import RewardCheckpointError
    from dreamlite_data.rewards.pairs import PairsError

    logging.set_verbosity_error()  # it comments on every key of an older config.json
    try:
        yield
    except (RewardCheckpointError, PairsError) as error:
        fail(str(error), 2)


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        fail(f"there is no file {path}", 2)
    return path


# -- commands


@rewards.command()
def score(
    kind: KindOfModel, model: Model,
    rows: Annotated[Path, typer.Argument(metavar="ROWS.jsonl", help='A line a row: {"image", "prompt"} or {"source", "edited", "instruction"}.')],
    base: Base = None, device: Device = "auto", dtype: Dtype = "auto", four_bit: FourBit = False, batch_rows: BatchRows = 64,
    dry_run: DryRun = False, utilisation: Utilisation = 0.4, format_: AnswerFormat = Format.table,
) -> None:  # fmt: skip
    """Score every row of a JSON Lines file and print a JSON line for each, in order; paths are relative to the file.

    Lines hold 'row' (line number), 'id' where the row has one, 'mu' (higher is better, no fixed range) and 'log_sigma' (its log
    standard deviation); for editreward also 'follow_mu' and 'quality_mu'. A bad row has 'error' instead and stops nothing.
    --format is of --dry-run.
    """
    _existing_file(rows)
    with _clear_errors():
        from dreamlite_data.rewards.rows import inputs_of_rows, score_file

        if dry_run:
            _print_plan(kind, model, base, lambda: inputs_of_rows(rows, kind.value), batch_rows, utilisation, format_)
            return
        loaded = _load(kind, model, base, device, dtype, four_bit)
        done = bad = 0
        for row in score_file(loaded, rows, batch_rows):
            done, bad = done + 1, bad + ("error" in row)
            sys.stdout.write(json.dumps(row, ensure_ascii=True) + "\n")
            if done % batch_rows == 0:
                sys.stdout.flush()
        typer.echo(f"{done:,} rows, {bad:,} of them with an error; scorer {loaded.scorer_id}", err=True)


@rewards.command("verify-checkpoint")
def verify_checkpoint(
    model: Model, base: Base = None, device: Device = "auto", dtype: Dtype = "auto", four_bit: FourBit = False,
    golden: Annotated[Path | None, typer.Option(help="JSON list of rows with the scores of the authors' code, to compare with.")] = None,
    tolerance: Annotated[float | None, typer.Option(min=0, help="Largest difference to a golden score. Default 2e-5 (float32).")] = None,
    headers_only: Annotated[bool, typer.Option("--headers-only", help="Load no weights: no positions check, no golden scores.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="Also list every stored key with its shape, type and place.")] = False,
    format_: AnswerFormat = Format.table,
) -> None:  # fmt: skip
    """Check a reward checkpoint point by point: files, layout, every key and shape, prompts, heads, vocabulary, hashes, positions, scores.

    Exit code 0 where all points are ok (warnings included), 1 where one failed. File hashes are compared with SHA256SUMS in the
    directory (the form that sha256sum writes).
    """
    if golden is not None:
        _existing_file(golden)
        if headers_only:
            fail("--golden compares scores, and --headers-only computes none; leave one of them out", 2)
    with _clear_errors():
        from dreamlite_data.rewards.hub import checkpoint_directory
        from dreamlite_data.rewards.stored import read_headers, weight_files
        from dreamlite_data.rewards.verify import FAILED, SKIPPED, TOLERANCE, key_rows
        from dreamlite_data.rewards.verify import verify_checkpoint as verify

        place = _device(device)
        folder = checkpoint_directory(model, base)
        checks = list(verify(
            folder, golden=golden, tolerance=TOLERANCE if tolerance is None else tolerance, run=not headers_only,
            device=place, dtype=_dtype(dtype, place, four_bit), four_bit=four_bit,
        ))  # fmt: skip
        print_rows([dataclasses.asdict(check) for check in checks], format_)
        if keys:
            print_rows(key_rows(read_headers(weight_files(folder))), format_)
        failed = [check.name for check in checks if check.state in (FAILED, SKIPPED)]
        if failed:
            fail(f"{model} did not pass: {', '.join(failed)}", 1)


@rewards.command("eval-pairs")
def eval_pairs(
    kind: KindOfModel, model: Model,
    pairs: Annotated[Path, typer.Argument(
        metavar="PAIRS.jsonl",
        help='A line a pair: {"image_a", "image_b", "prompt"} or {"source", "edited_a", "edited_b", "instruction"}, and "preferred".',
    )],
    label_column: Annotated[str, typer.Option(help="Key of what people prefer: a, b or tie. Of one head alone: KEY_follow, KEY_quality.")]
    = "preferred",
    labels: Annotated[Path | None, typer.Option(help="JSON Lines with the labels instead, found by the pairs' 'id'.")] = None,
    base: Base = None, device: Device = "auto", dtype: Dtype = "auto", four_bit: FourBit = False,
    dry_run: DryRun = False, utilisation: Utilisation = 0.4, format_: AnswerFormat = Format.table,
) -> None:  # fmt: skip
    """Measure how often a reward model agrees with people on pairs, with 95 % Wilson intervals, for each head.

    without_ties: pairs in which people saw a difference. with_ties: all pairs; the model calls a tie where scores differ by at most
    a threshold, here the best one for these pairs (arXiv 2305.14324). with_ties_held_out: the threshold of the other half of the pairs.
    """
    _existing_file(pairs)
    if labels is not None:
        _existing_file(labels)
    with _clear_errors():
        from dreamlite_data.rewards.pairs import accuracy_rows, inputs_of_pairs, score_pairs

        if dry_run:
            _print_plan(kind, model, base, lambda: inputs_of_pairs(pairs, kind.value), 64, utilisation, format_)
            return
        scored = score_pairs(_load(kind, model, base, device, dtype, four_bit), pairs, label_column, labels)
        for number, error in scored.errors[:20]:
            warn(f"line {number} is left out: {error}")
        if len(scored.errors) > 20:
            warn(f"{len(scored.errors) - 20:,} more lines are left out")
        print_rows(accuracy_rows(scored), format_)


# -- what they share


def _load(kind: Kind, model: str, base: str | None, device: str, dtype: str, four_bit: bool) -> RewardModel:
    from dreamlite_data.rewards import load_reward
    from dreamlite_data.rewards.hub import checkpoint_directory

    place = _device(device)
    number_type = _dtype(dtype, place, four_bit)
    folder = checkpoint_directory(model, base)
    _check_kind(kind, model, folder)
    return load_reward(folder, place, number_type, four_bit=four_bit)


def _check_kind(kind: Kind, model: str, folder: Path) -> None:
    from dreamlite_data.rewards.network import read_config
    from dreamlite_data.rewards.spec import read_spec

    found = read_spec(folder, read_config(folder).model_type).kind
    if found != kind.value:
        fail(f"{model} holds a reward model of the kind {found}, not {kind.value}; say {found}, with rows of its form", 2)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        fail(f"--device '{name}' is not auto, cpu, cuda or cuda:N", 2)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        fail(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here; use --device cpu, or plan with --dry-run", 2)
    return name


def _dtype(name: str, device: str, four_bit: bool) -> torch.dtype:
    import torch

    if name == "auto":
        return torch.bfloat16 if four_bit or device.startswith("cuda") else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        fail(f"--dtype '{name}' is not auto, {', '.join(known)}", 2)
    return known[name]


def _print_plan(
    kind: Kind, model: str, base: str | None, inputs: Callable[[], Iterator[RewardInput]], batch_rows: int, utilisation: float, format_: Format
) -> None:
    from dreamlite_data.rewards.hub import checkpoint_headers
    from dreamlite_data.rewards.loader import vocabulary_rows
    from dreamlite_data.rewards.network import skeleton
    from dreamlite_data.rewards.plan import make_plan, row_shapes, typical_shape
    from dreamlite_data.rewards.spec import read_spec
    from dreamlite_data.rewards.text import RewardTokenizer

    folder, header = checkpoint_headers(model, base)
    _check_kind(kind, model, folder)
    config = skeleton(folder, header).config
    spec = read_spec(folder, config.model_type)
    tokenizer = RewardTokenizer(folder, spec, vocabulary_rows(header, folder))
    count = sum(1 for _ in inputs())
    shapes = row_shapes(tokenizer, config, spec, inputs())
    first = next(shapes, None)
    if first is None:
        warn("no row of the file has readable images and words; planned for one row with square images")
        found = make_plan(header, config, [typical_shape(tokenizer, config, spec)], max(count, 1), batch_rows, utilisation)
    else:
        found = make_plan(header, config, itertools.chain([first], shapes), count, batch_rows, utilisation)
    if format_ == Format.json:
        say(json.dumps(dataclasses.asdict(found), indent=1))
        return
    for title, table in (
        ("weights (GB = 1e9 bytes)", found.weights), ("memory while scoring", found.memory), ("an average row", [found.row]),
        (f"time for {count:,} rows at {utilisation:.0%} of the peak of bfloat16", found.gpus),
    ):  # fmt: skip
        say(f"\n{title}")
        print_rows(table, "table")

