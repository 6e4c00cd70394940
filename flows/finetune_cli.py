"""`dreamlite finetune`: from a folder of captioned images, or of edit triplets, to an adapter and pictures before and after.
Looks at what it is given before anything is computed; the work is the flow in flows.finetune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.console import clear_errors, say, warn

if TYPE_CHECKING:
    from flows.run import Run

app = typer.Typer()

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl"}
TABLES = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "jsonl", ".parquet": "parquet"}
MAPPINGS = {"generate": "image_text", "edit": "triplets"}
"""What the columns of a table are taken to mean where --mapping does not say."""
STAGE = "sft"
SIZE_FILES = ("dreamlite.json", "unet/config.json", "vae/config.json")

Task = Literal["generate", "edit"]


@app.command()
def finetune(
    data: Annotated[str, typer.Argument(help="A folder of images with captions (a.jpg and a.txt), a table (.jsonl, .csv, .parquet) of images or of source, target and instruction, a folder of .tar shards, or a hub dataset owner/name.")],
    from_: Annotated[str, typer.Option("--from", help="The checkpoint to start from: a folder in diffusers layout, or a hub id org/name@revision.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter and the pictures.")],
    task: Annotated[Task, typer.Option(help="generate: images with captions. edit: triplets of source, target and instruction.")] = "generate",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter. Default: the preset's 16.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: the preset's 1,000.")] = None,
    size: Annotated[int | None, typer.Option(help="Side in px to train at. Default: the checkpoint's own.")] = None,
    hidden_state: Annotated[str | None, typer.Option(help="pre_norm or post_norm, where the checkpoint does not say. Default: pre_norm.")] = None,
    kind: Annotated[str | None, typer.Option(help="How rows lie in DATA, where that is not plain: folder, webdataset, parquet, jsonl, sample_folders, huggingface.")] = None,
    mapping: Annotated[str | None, typer.Option(help="What the columns of DATA mean: a packaged mapping, e.g. magicbrush, or a .yaml file.")] = None,
    lake: Annotated[Path | None, typer.Option("--lake", "-l", envvar="DREAMLITE_LAKE", help="Folder of the lake. Default: OUTPUT/lake.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="Override one setting, e.g. --set train.sft.learning_rate=5e-5. May be repeated.")] = None,
) -> None:  # fmt: skip
    """Fine-tune a checkpoint on your own images: trains a LoRA adapter that diffusers loads, and draws before and after."""
    with clear_errors():
        from flows.engine import execute, go_offline

        go_offline()
        source = describe_data(data, task, kind, mapping)
        size_px = size or own_size_px(from_)
        overrides = [
            f"start.checkpoint={json.dumps(_absolute(from_))}",
            f"refresh.extra_sources={json.dumps([source])}",
            f"train.{STAGE}.tasks={json.dumps({task: 1.0})}",
            f"train.{STAGE}.datasets={json.dumps(['t2i' if task == 'generate' else 'edit'])}",
        ]
        given = {f"train.{STAGE}.steps": steps, "start.size_px": size, "start.hidden_state": hidden_state, "refresh.policy.min_side_px": size_px}
        overrides += [f"{name}={value}" for name, value in given.items() if value is not None]
        overrides += set_ or []
        if rank is not None:  # last, for --set may have given the adapter as a whole
            overrides.append(f"train.{STAGE}.lora.rank={rank}")
        run = execute("finetune", "finetune", lake or output / "lake", overrides, None, "inline", say, warn)
        deliver(run, output)


def describe_data(data: str, task: Task, kind: str | None, mapping: str | None) -> dict[str, Any]:
    """DATA as a source of the refresh. Raises ConfigError where it is not there, has no images or captions, or its layout is not plain."""
    from flows.config import ConfigError

    path = Path(data).expanduser()
    if not path.exists():
        if data.count("/") != 1 or data.startswith((".", "/", "~")):
            raise ConfigError(f"there is no folder or file {data}: give the one with your images")
        return _source(data, kind or "huggingface", mapping or MAPPINGS[task])
    kind = kind or _kind_of(path, task)
    if kind == "folder":
        _check_captions(path)
    if mapping is None and kind in ("jsonl", "parquet", "huggingface"):
        mapping = MAPPINGS[task]
    if kind == "sample_folders" and mapping is None:
        raise ConfigError("--kind sample_folders needs --mapping: it says which files of a folder are which, e.g. instruct_pix2pix")
    return _source(str(path.resolve()), kind, mapping)


def _source(path: str, kind: str, mapping: str | None) -> dict[str, Any]:
    return {"name": "finetune", "kind": kind, "path": path} | ({"mapping": mapping} if mapping else {})


def _kind_of(path: Path, task: Task) -> str:
    from flows.config import ConfigError

    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise ConfigError(f"{path} is a {path.suffix or 'file without suffix'}: give a folder, or a table ({', '.join(TABLES)})")
        return TABLES[path.suffix.lower()]
    suffixes = {file.suffix.lower() for file in path.iterdir() if file.is_file() and not file.name.startswith(".")}
    if ".tar" in suffixes:
        return "webdataset"
    if ".parquet" in suffixes:
        return "parquet"
    if suffixes & {".jsonl", ".csv"}:
        return "jsonl"
    if task == "edit":
        raise ConfigError(
            f'{path} holds no table of triplets: put an edits.jsonl there with a line {{"source": "a.jpg", "target": "b.jpg", "instruction": '
            '"make it snow"} for each, or give --kind and --mapping'
        )
    return "folder"


def _check_captions(folder: Path) -> None:
    from dreamlite_data.sources.base import CAPTION_SUFFIXES
    from flows.config import ConfigError

    images = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMAGES]
    if not images:
        raise ConfigError(f"{folder} holds no images ({', '.join(sorted(IMAGES))}): give the folder that does")
    bare = [file for file in images if not any(file.with_suffix(f".{suffix}").is_file() for suffix in CAPTION_SUFFIXES)]
    first = f"{bare[0].name} has no {bare[0].stem}.txt beside it" if bare else ""
    if len(bare) == len(images):
        raise ConfigError(f"none of the {len(images)} images in {folder} has a caption, for one {first}: write what each shows into such a file")
    if bare:
        warn(f"{len(bare)} of {len(images)} images have no caption and are left out, for one {first}")


def own_size_px(model: str) -> int:
    """The side (px) that a checkpoint says it works on; of a hub model only the files that say so are fetched. Raises ConfigError."""
    from flows.config import ConfigError

    folder = Path(model).expanduser()
    if not folder.is_dir():
        from dreamlite_data.rewards.hub import fetch, parse_model
        from dreamlite_data.rewards.stored import RewardCheckpointError

        try:
            folder = fetch(parse_model(model, "a checkpoint in diffusers layout"), SIZE_FILES, ())
        except RewardCheckpointError as error:
            raise ConfigError(f"--from: {error}. Downloads are off unless HF_HUB_OFFLINE=0 is set") from None
    try:
        if (folder / "dreamlite.json").is_file():
            return int(json.loads((folder / "dreamlite.json").read_text())["size_px"])
        from trainers.model import latent_scale

        scale = latent_scale(json.loads((folder / "vae" / "config.json").read_text()))
        return int(json.loads((folder / "unet" / "config.json").read_text())["sample_size"]) * scale
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--from: {folder} is no checkpoint in diffusers layout ({type(error).__name__}: {error})") from None


def _absolute(model: str) -> str:
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def deliver(run: Run, output: Path) -> None:
    """Put the adapter and the pictures into `output` and say how they are used."""
    from trainers.lora import ADAPTER_FILE

    output.mkdir(parents=True, exist_ok=True)
    adapter = shutil.copyfile(run.records[STAGE].path("adapter") / ADAPTER_FILE, output / ADAPTER_FILE)
    for name, file in run.records["pictures"].outputs["paths"].items():
        say(f"pictures:   {shutil.copyfile(run.records['pictures'].directory / file, output / f'before_after_{name}.png')}")
    say(f"adapter:    {adapter}")
    drawn = run.config["evaluate"]
    options = f"--steps {drawn['steps']} --guidance-scale {drawn['guidance_scale']:g}"
    say(f"checkpoint: {run.records[STAGE].path('checkpoint')} (the adapter merged in; dreamlite generate --checkpoint takes it, {options})")
    say(f'in diffusers: pipeline.unet.load_lora_adapter("{output}", weight_name="{ADAPTER_FILE}", prefix="unet")')
