"""The commands about datasets: policies tried, committed and compared, versions listed and published, images forgotten.
`flows.cli` takes them in; what they do lives in dreamlite_data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from flows.console import DEFAULT_LAKE, LakeFolder, clear_errors, fail, print_rows, say, warn

if TYPE_CHECKING:
    from dreamlite_data.lake import Lake
    from dreamlite_data.policies.trial import Trial

app = typer.Typer(add_completion=False)
policy = typer.Typer(no_args_is_help=True, help="Try a policy file on the lake, make it the rules of a dataset, compare versions.")
app.add_typer(policy, name="policy")

PolicyFile = Annotated[Path, typer.Argument(help="A policy file: '-- @candidates' and '-- @rule' blocks, like those of the package.")]
Parameter = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Value of one $parameter, e.g. --set min_sharpness=0.6. May be repeated.")
]
DatasetName = Annotated[str, typer.Argument(help="Name of a dataset, as in `dreamlite datasets`.")]


@contextmanager
def _clear_errors() -> Iterator[None]:
    from dreamlite_data.policies import PolicyError
    from dreamlite_data.policies.curate import CurationError

    with clear_errors():
        try:
            yield
        except (PolicyError, CurationError) as error:
            fail(str(error), 2)


def _open(lake: Path, write: bool = False) -> Lake:
    from dreamlite_data.lake import Lake

    opened = Lake(lake, read_only=True)  # a lake that is not there is an error, not a new lake
    known = opened.query("SELECT table_name FROM duckdb_tables() WHERE table_name = 'takedowns'")
    if len(known) and not write:
        return opened
    opened.close()
    upgraded = Lake(lake)  # a lake of an older version of the package gets the tables that came since
    if write:
        return upgraded
    upgraded.close()
    return Lake(lake, read_only=True)


def _overrides(texts: list[str] | None) -> dict[str, Any]:
    values = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            fail(f"--set '{text}' is not of the form name=value", 2)
        try:
            found = yaml.safe_load(value)
            values[name.strip()] = value.strip() if isinstance(found, date) else found  # a version keeps its parameters as JSON
        except yaml.YAMLError as error:
            fail(f"--set '{text}' has no readable value: {' '.join(str(error).split())}", 2)
    return values


# -- policies


@policy.command("try")
def try_(
    file: PolicyFile, lake: LakeFolder = DEFAULT_LAKE, set_: Parameter = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Dataset to compare with. Default: the file's name.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="File of the contact sheet. Default: <lake>/reports/policy-<dataset>.html")] = None,
    samples: Annotated[int, typer.Option(min=1, max=50, help="Rows shown on each side of each rule.")] = 6,
) -> None:  # fmt: skip
    """Judge all candidates by a policy file, writing nothing to the lake: funnel beside the current one, and a contact sheet."""
    with _clear_errors():
        from dreamlite_data.erasure import SHEETS
        from dreamlite_data.policies.contact_sheet import write_contact_sheet
        from dreamlite_data.policies.trial import try_policy

        opened = _open(lake)
        trial = try_policy(opened, file, dataset, _overrides(set_))
        _show_trial(trial)
        path = write_contact_sheet(opened, trial, sheet or lake / SHEETS / f"policy-{trial.name}.html", samples)
        say(f"contact sheet: {path}")


def _show_trial(trial: Trial) -> None:
    print_rows(trial.funnel, "table")
    against = f"{trial.name}@{trial.version}" if trial.version else f"no version of {trial.name} yet"
    say(f"\n{trial.kept:,} of {len(trial.judged):,} rows stay; against {against}: {len(trial.entering):,} enter, "
                f"{len(trial.leaving):,} leave")  # fmt: skip
    for title, rows in (("enter", trial.entering), ("leave", trial.leaving)):
        reasons: dict[str, int] = {}
        for rule in rows["rule"].to_pylist():
            reasons[rule] = reasons.get(rule, 0) + 1
        if reasons:
            say(f"{title} by rule: " + ", ".join(f"{rule} {count:,}" for rule, count in sorted(reasons.items())))
    for text in trial.warnings:
        warn(text)


@policy.command()
def commit(
    file: PolicyFile, lake: LakeFolder = DEFAULT_LAKE, set_: Parameter = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="Dataset to make a version of. Default: the file's name.")] = None,
) -> None:  # fmt: skip
    """Make the rows of a policy file the next version of a dataset, and its rules those of every later refresh (until reset)."""
    with _clear_errors():
        from dreamlite_data.policies.trial import commit_policy

        made, trial = commit_policy(_open(lake, write=True), file, name or file.stem, _overrides(set_))
        _show_trial(trial)
        known = " (as before: same rows, same rules)" if made["version"] == trial.version else ""
        say(f"dataset {made['name']}@{made['version']}: {made['rows']:,} rows{known}; later refreshes use this policy")


@policy.command()
def reset(name: DatasetName, lake: LakeFolder = DEFAULT_LAKE) -> None:
    """Take a committed policy out of force: the next refresh decides by the packaged one again. Versions stay."""
    with _clear_errors():
        from dreamlite_data.policies.curate import DATASETS
        from dreamlite_data.policies.trial import reset_policy

        reset_policy(_open(lake, write=True), name)
        say(f"{name}: " + ("the packaged policy holds again" if name in DATASETS else "no later refresh makes versions of it"))


@policy.command()
def diff(
    name: DatasetName,
    before: Annotated[int | None, typer.Argument(help="Version to compare from. Default: the parent of the other.")] = None,
    after: Annotated[int | None, typer.Argument(help="Version to compare to. Default: the newest.")] = None,
    lake: LakeFolder = DEFAULT_LAKE,
    rows: Annotated[int, typer.Option(min=0, help="How many of the rows to print.")] = 20,
) -> None:
    """Say how two versions of a dataset differ: rules, rows added, removed and changed, and which rule decided."""
    with _clear_errors():
        from dreamlite_data.policies.versions import diff_versions

        found = diff_versions(_open(lake), name, before, after)
        counts = ", ".join(f"{count:,} {kind}" for kind, count in found.counts().items())
        say(f"{name}@{found.before} -> {name}@{found.after}: {counts}")
        for rule, old, new in found.rules:
            say(f"rule {rule}: {old or 'absent'}  ->  {new or 'absent'}")
        if len(found.rows) and rows:
            print_rows(found.rows.slice(0, rows).to_pylist(), "table")


@policy.command()
def show(
    name: DatasetName, lake: LakeFolder = DEFAULT_LAKE,
    version: Annotated[int | None, typer.Option(help="Default: the newest.")] = None,
) -> None:  # fmt: skip
    """Print the rules that made a dataset version, in their order, with the values of their parameters."""
    with _clear_errors():
        from dreamlite_data.policies.committed import committed_policies
        from dreamlite_data.policies.versions import stored_rules

        opened = _open(lake)
        number, rules = stored_rules(opened, name, version)
        held = committed_policies(opened).get(name)
        say(
            f"{name}@{number}; refreshes use " + (f"the policy committed with version {held.version}" if held else "the packaged policy")
        )
        print_rows(rules, "table")


# -- datasets


@app.command()
def datasets(lake: LakeFolder = DEFAULT_LAKE) -> None:
    """List every dataset version with its rows, its parent and the snapshot of the lake that it was made from."""
    with _clear_errors():
        from dreamlite_data.policies.versions import list_versions

        print_rows(list_versions(_open(lake)), "table")


@app.command()
def publish(
    dataset: Annotated[str, typer.Argument(help="NAME for the newest version of a dataset, or NAME@VERSION.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to make; it must not exist yet.")],
    lake: LakeFolder = DEFAULT_LAKE,
    format_: Annotated[
        str, typer.Option("--format", "-f", help="huggingface (Parquet that load_dataset opens) or webdataset (tar).")
    ] = "huggingface",
    include_restricted: Annotated[
        bool,
        typer.Option("--include-restricted", help="Also rows whose licence forbids it or is unknown. You answer for having the right."),
    ] = False,
) -> None:
    """Write a dataset version as a folder to share: shards, a dataset card with funnel, licences and samples, and a manifest."""
    with _clear_errors():
        from dreamlite_data.publish import publish as publish_version

        name, _, version = dataset.partition("@")
        if version and not version.isdigit():
            fail(f"'{dataset}' is not NAME or NAME@VERSION, as in `dreamlite datasets`", 2)
        manifest = publish_version(_open(lake), name, int(version) if version else None, to, format_, include_restricted)
        for item in manifest["left_out"]:
            warn(f"{item['rows']:,} rows left out, licence {item['licence']}: {item['why']}")
        say(
            f"{manifest['dataset']}@{manifest['version']}: {manifest['rows']:,} rows in {len(manifest['files']):,} files at {to}"
        )


@app.command()
def forget(
    image: Annotated[list[str], typer.Argument(help="Ids of images (sha256 of their stored bytes), as in the column image_id.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept, and given when the image comes back in a later refresh.")],
    lake: LakeFolder = DEFAULT_LAKE,
    near: Annotated[bool, typer.Option("--near", help="Also everything in the same group of duplicates.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove images and all that was made from them, from every table, version, cache and file, with a proof of absence.

    Snapshots of the lake that could still see them are expired, so time travel to those ends.
    """
    with _clear_errors():
        from dreamlite_data.takedown import forget as forget_images

        done = forget_images(_open(lake, write=not dry_run), image, reason, near, dry_run)
        say(f"{'would forget' if dry_run else 'forgot'} {len(done.images)} images, {len(done.derived)} of them made from the others")
        print_rows([{"table": name, "rows": count} for name, count in done.rows.items()], "table")
        say(
            f"files rewritten: {done.files_rewritten}; snapshots expired: {len(done.expired_snapshots)}; "
            f"cached files deleted: {done.cached_files}"
        )
        for title, names in (
            ("dataset versions that lose rows", done.datasets), ("new versions without them", done.new_versions),
            ("learned from them, retrain these", done.checkpoints), ("still in the sources, remove it there", done.sources),
        ):  # fmt: skip
            if names:
                say(f"{title}: {', '.join(names)}")
        if done.proof:
            say(f"takedown {done.takedown_id}, proof {done.proof}")


# -- the rules that verify edits


@app.command("verify-report")
def verify_report(
    seed: Annotated[int, typer.Option(help="Draws the truth sets. The packaged thresholds were calibrated with other seeds.")] = 1,
    photos: Annotated[int, typer.Option(min=1, help="Photos that cut-outs are pasted onto and exact operations applied to.")] = 40,
    scene_edits: Annotated[int, typer.Option(min=1, help="Edits of the small world.")] = 400,
    masks: Annotated[bool, typer.Option(help="--no-masks withholds the masks, as with sets that bring none.")] = True,
    faults: Annotated[bool, typer.Option("--faults", help="Also a line for each planted fault: how much of it is caught.")] = False,
    ocr: Annotated[bool, typer.Option(help="Read the words of text edits (extra 'ocr'). --no-ocr leaves those conditions unevaluated.")] = False,
    cutouts: Annotated[
        Path | None, typer.Option(help="Folder of PNG cut-outs with names. Default: shapes that are drawn here.", file_okay=False, exists=True)
    ] = None,
) -> None:  # fmt: skip
    """Measure the rules that verify edits on edits whose truth is known: precision and recall a type, with 95 % intervals, and
    the conditions that nothing was there to evaluate."""
    from dreamlite_data.operators.cutouts import CutOutError, CutOutFolder
    from dreamlite_data.operators.safety import MissingExtra
    from dreamlite_data.operators.verify_truth import verify_report as report

    try:
        rows = report(seed, photos, scene_edits, CutOutFolder(cutouts, "") if cutouts else None, masks, ocr=ocr)
    except (CutOutError, MissingExtra) as error:
        fail(str(error), 2)
    wanted = ("all",) if not faults else None
    print_rows([_as_line(row, faults) for row in rows if wanted is None or row["fault"] in wanted], "table")
    absent: dict[str, list[str]] = {}
    for row in rows:
        for measure in row.get("not_evaluated", ()):
            absent.setdefault(measure, []).append(f"{row['origin']} {row['edit_type']}")
    for measure, types in sorted(absent.items()):
        say(f"not evaluated: {measure} ({', '.join(types)})")


def _as_line(row: dict[str, Any], faults: bool) -> dict[str, Any]:
    """A row of the report for reading: shares with their interval in one cell."""

    def share(name: str) -> str:
        value = row.get(name)
        return "" if value is None else f"{value:.3f} ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"

    line = {"origin": row["origin"], "edit type": row["edit_type"]}
    if faults:
        line["fault"] = row["fault"]
    line |= {"true": row.get("true", ""), "passed": row.get("passed", ""), "false": row["false"], "missed": row["missed"]}
    line |= {"recall": share("recall"), "precision": share("precision")}
    return line | ({"caught": share("caught")} if faults else {})
