"""The dataset card: README.md with the front matter that the hub reads, and what a person wants to know before using the rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from dreamlite_data.lake import Lake
from dreamlite_data.publishing.rows import PublishedRows, Shard, row_groups
from dreamlite_data.thumbnails import mask_png, thumbnail

SAMPLES = 6
THUMBNAIL_PX = 192
_TASKS = {"generate": "text-to-image", "edit": "image-to-image"}
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"), (10**8, "10M<n<100M"))
_WHAT = {
    "generate": "`image` and the caption `text` that fits it",
    "edit": "`source_image`, the instruction `text`, and `image`, which shows the source after the edit; `mask` is 8 x 8 cells, each the "
    "share of changed pixels",
}


def write_card(lake: Lake, published: PublishedRows, shards: list[Shard], folder: Path, format_: str, features: dict[str, Any]) -> None:
    """Write README.md and assets/ below `folder`. `features` maps a task to its `datasets.Features` (empty for WebDataset)."""
    front = _front_matter(published, shards, folder, format_, features)
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=120)
    body = "\n\n".join(part for part in _body(lake, published, shards, folder, format_) if part)
    (folder / "README.md").write_text(f"---\n{text}---\n\n{body}\n", encoding="utf-8")


def config_name(published: PublishedRows, task: str) -> str:
    """The name under which a task's rows are loaded: 'default' where there is only one task."""
    return task if len(set(published.rows["task"].to_pylist())) > 1 else "default"


def data_folder(published: PublishedRows, task: str) -> str:
    """Where a task's shards lie, relative to the publication."""
    name = config_name(published, task)
    return "data" if name == "default" else f"data/{name}"


def _front_matter(published: PublishedRows, shards: list[Shard], folder: Path, format_: str, features: dict[str, Any]) -> dict[str, Any]:
    tasks = sorted({shard.task for shard in shards})
    hubs = sorted({licence.hub for licence in published.licences})
    suffix = "parquet" if format_ == "huggingface" else "tar"
    configs = [
        {
            "config_name": config_name(published, task),
            "data_files": [
                {"split": split, "path": f"{data_folder(published, task)}/{split}-*.{suffix}"} for split in _splits(shards, task)
            ],
        }
        for task in tasks
    ]
    info = [
        {
            "config_name": config_name(published, task),
            "features": features[task]._to_yaml_list(),
            "splits": [{"name": split, **_split_facts(shards, task, split)} for split in _splits(shards, task)],
            "dataset_size": sum(_split_facts(shards, task, split)["num_bytes"] for split in _splits(shards, task)),
            "download_size": sum(
                (folder / data_folder(published, s.task) / f"{s.stem}.{suffix}").stat().st_size for s in shards if s.task == task
            ),
        }
        for task in tasks
        if task in features
    ]
    rows = len(published.rows)
    return {
        "license": hubs[0] if len(hubs) == 1 else hubs,
        "pretty_name": published.dataset.name,
        "task_categories": [_TASKS.get(task, "other") for task in tasks],
        "size_categories": [next((name for limit, name in _SIZES if rows < limit), "n>100M")],
        "configs": configs,
        **({"dataset_info": info if len(info) > 1 else info[0]} if info else {}),
    }


def _splits(shards: list[Shard], task: str) -> list[str]:
    return list(dict.fromkeys(shard.split for shard in shards if shard.task == task))


def _split_facts(shards: list[Shard], task: str, split: str) -> dict[str, int]:
    parts = [shard.rows for shard in shards if (shard.task, shard.split) == (task, split)]
    return {"num_bytes": sum(sum(rows["size_bytes"].to_pylist()) for rows in parts), "num_examples": sum(len(rows) for rows in parts)}


def _body(lake: Lake, published: PublishedRows, shards: list[Shard], folder: Path, format_: str) -> list[str]:
    dataset = published.dataset
    counted = [
        [config_name(published, task), split, f"{_split_facts(shards, task, split)['num_examples']:,}"]
        for task in sorted({shard.task for shard in shards})
        for split in _splits(shards, task)
    ]
    sources = Counter(zip(published.rows["source"].to_pylist(), published.rows["licence"].to_pylist(), strict=True))
    return [
        f"# {dataset.name}, version {dataset.version}",
        f"{len(published.rows):,} rows, curated with DreamLite Pipeline. Each row of `{dataset.name}` holds "
        + "; or ".join(_WHAT[task] for task in sorted({shard.task for shard in shards}))
        + f". Digest of the version: `{dataset.digest}`; sha256 of every file: `manifest.json`.",
        "## Loading\n\n" + _loading(published, shards, format_),
        "## Rows\n\n" + _table(["config", "split", "rows"], counted),
        _samples(lake, published, folder),
        "## How rows were chosen\n\n" + _funnel(lake, dataset.name, dataset.version),
        "## Sources and licences\n\n"
        + _table(
            ["source", "licence as stated", "rows"],
            [[s or "unknown", stated, f"{n:,}"] for (s, stated), n in sorted(sources.items(), key=str)],
        )
        + "\n\nEvery row names its licence in `licence`; keep to it for each row you use."
        + _pasted(published),
        "## Left out\n\n"
        + (
            _table(["licence", "why", "rows"], [[name, why, f"{n:,}"] for (name, why), n in published.left_out.items()])
            if published.left_out
            else "No row of the version was left out for its licence."
        ),
    ]


def _pasted(published: PublishedRows) -> str:
    """The cut-outs in composites, where there are any: `made_of` gives them the credit that their licences ask for."""
    if not published.pasted:
        return ""
    rows = [[origin, stated or "unknown", f"{n:,}"] for (origin, stated), n in published.pasted.items()]
    return " Composites stand under the strictest of photo and cut-outs; `made_of` names each with its own.\n\n" + _table(
        ["cut-outs of", "licence as stated", "rows"], rows
    )


def _loading(published: PublishedRows, shards: list[Shard], format_: str) -> str:
    name = config_name(published, shards[0].task)
    which = "" if name == "default" else f', "{name}"'
    if format_ == "huggingface":
        return (
            f'```python\nfrom datasets import load_dataset\n\nrows = load_dataset("PATH_OR_HUB_ID"{which}, split="{shards[0].split}")\n```'
        )
    return (
        "WebDataset tars; members of one key form one row: `.txt` holds the caption, `.json` the instruction and all else. "
        "DreamLite Pipeline reads the folder as a source of kind `webdataset`."
    )


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)


def _funnel(lake: Lake, name: str, version: int) -> str:
    rules = lake.query(
        "SELECT r.position, r.rule, r.body, r.parameters, count(d.row_id) AS rejected FROM policy_rules r LEFT JOIN decisions d "
        "ON d.dataset = r.dataset AND d.version = r.version AND d.rule_position = r.position "
        "WHERE r.dataset = $name AND r.version = $version GROUP BY ALL ORDER BY r.position",
        {"name": name, "version": version},
    ).to_pylist()
    total = lake.query("SELECT count(*) AS n FROM decisions WHERE dataset = $n AND version = $v", {"n": name, "v": version})["n"][0].as_py()
    rows, left = [], total
    for rule in rules:
        values = {key: value for key, value in json.loads(rule["parameters"] or "{}").items() if f"${key}" in rule["body"]}
        body = f"`{' '.join(rule['body'].split())}`" + "".join(f", `${key}` = {value}" for key, value in sorted(values.items()))
        rows.append([rule["rule"], body, f"{left:,}", f"{rule['rejected']:,}", f"{left - rule['rejected']:,}"])
        left -= rule["rejected"]
    return "Rules in their order; a row goes out by the first that it fails. A rule with a margin passes from zero up.\n\n" + _table(
        ["rule", "condition", "in", "rejected", "out"], rows
    )


def _samples(lake: Lake, published: PublishedRows, folder: Path) -> str:
    """A draw by the hash of the row's id, written to assets/ and shown in a table."""
    ids = published.rows["row_id"].to_pylist()
    chosen = sorted(range(len(ids)), key=lambda index: hashlib.sha256(f"sample:{ids[index]}".encode()).digest())[:SAMPLES]
    rows = [row for group in row_groups(lake, published.rows.take(sorted(chosen))) for row in group]
    assets = folder / "assets"
    assets.mkdir()
    lines = []
    for number, row in enumerate(rows):
        source = _asset(assets, f"sample-{number:02d}-source", row["source_bytes"])
        mask = ""
        if row["edit_mask"]:
            (assets / f"sample-{number:02d}-mask.png").write_bytes(mask_png(row["edit_mask"], 8))
            mask = f"![mask](assets/sample-{number:02d}-mask.png)"
        target = _asset(assets, f"sample-{number:02d}", row["image_bytes"])
        lines.append([source, target, mask, row["text"]] if row["task"] == "edit" else ["", target, "", row["text"]])
    if not any(line[0] for line in lines):
        return "## Samples\n\n" + _table(["image", "text"], [[line[1], line[3]] for line in lines])
    return "## Samples\n\n" + _table(["source", "image", "mask", "text"], lines)


def _asset(folder: Path, stem: str, payload: bytes | None) -> str:
    if payload is None:
        return ""
    small, mime = thumbnail(payload, THUMBNAIL_PX)
    name = f"{stem}.{'png' if mime == 'image/png' else 'jpg'}"
    (folder / name).write_bytes(small)
    return f"![sample](assets/{name})"
