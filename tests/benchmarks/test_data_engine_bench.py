"""What the data engine costs against yardsticks of the same run: the fused ingest, duplicates, commits, executors, re-deciding.
Every ratio compares two things that were measured in turn, so that a busy minute slows both."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image

from dreamlite_data import comparisons, executors, refresh, schema
from dreamlite_data.lake import Lake
from dreamlite_data.operators.base import Written, op_version, write_table
from dreamlite_data.operators.commits import commit
from dreamlite_data.operators.duplicates import Duplicates
from dreamlite_data.operators.hamming import pairs_between, pairs_within
from dreamlite_data.operators.ingest import Ingest
from dreamlite_data.policies.curate import judge
from dreamlite_data.policies.policy import read_policy
from dreamlite_data.settings import IngestSettings, RefreshSettings
from dreamlite_data.sources.photos import PHOTOS, find_photo
from tests.benchmarks.test_data_bench import million  # noqa: F401 - the fixture

pytestmark = pytest.mark.benchmark

SIDE_PX = 512


def photo_jpegs(count: int, side_px: int = SIDE_PX) -> list[bytes]:
    """Crops of the scikit photos with light grain, as JPEG q90 4:2:0: at 512 px about 70 KB each."""
    rng = np.random.default_rng(0)
    originals = []
    for place, name, _, _ in PHOTOS:
        path = find_photo(place, name)
        if path is None or path.suffix == ".tif":
            continue
        with Image.open(path) as image:
            if min(image.size) >= 300:
                originals.append(np.asarray(image.convert("RGB").resize([max(side_px, length) for length in image.size])))
    payloads = []
    for number in range(count):
        original = originals[number % len(originals)]
        top, left = (int(rng.integers(0, length - side_px + 1)) for length in original.shape[:2])
        grained = original[top : top + side_px, left : left + side_px] + rng.normal(0, 3, (side_px, side_px, 1))
        payloads.append(simplejpeg.encode_jpeg(np.clip(grained, 0, 255).astype(np.uint8), 90, "RGB", "420"))
    return payloads


def seconds_of(*works: Callable[[], object], rounds: int = 5) -> list[float]:
    """Least CPU seconds of each work over rounds taken in turn."""
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for index, work in enumerate(works):
            started = time.process_time()
            work()
            best[index] = min(best[index], time.process_time() - started)
    return best


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    return photo_jpegs(96)


# --- ingest ------------------------------------------------------------------------------------------------------------


def test_fused_ingest_against_decoding_and_against_loops_of_libraries(bench, jpegs: list[bytes], tmp_path: Path) -> None:
    operator = Ingest(IngestSettings())
    rows = pa.table({"subject_id": [str(number) for number in range(len(jpegs))], "payload": pa.array(jpegs, pa.binary())})

    def fused() -> None:
        answer, quality = operator.examine([payload.as_py() for payload in rows["payload"]])
        images = schema.rows_table("images", [{"image_id": row["image_id"], "bytes": row["bytes"], "mime": row["mime"], "width": row["width"],
                                               "height": row["height"], "size_bytes": len(row["bytes"])} for row in answer])  # fmt: skip
        assert len(images) == len(quality) == len(jpegs) and quality["error"].null_count == len(jpegs)

    def decode() -> None:
        for payload in jpegs:
            simplejpeg.decode_jpeg(payload, "RGB")

    decode_s, fused_s = seconds_of(decode, fused)
    print(f"\n{np.mean([len(payload) for payload in jpegs]) / 1024:.1f} KiB a file, {len(jpegs) / fused_s:.0f} images/s of CPU", end="")
    bench("fused_ingest_to_decode_rate", decode_s / fused_s, 0.60, higher_is_better=True)
    if importlib.util.find_spec("imagehash") is None:
        print("\nno row against imagehash: pip install 'dreamlite-pipeline[bench]'", end="")
    else:
        import imagehash

        def loop() -> None:
            for payload in jpegs:
                hashlib.sha256(payload).hexdigest()
                imagehash.phash(Image.open(io.BytesIO(payload)))

        loop_s, fused_s = seconds_of(loop, fused, rounds=3)
        bench("fused_ingest_to_imagehash_rate", loop_s / fused_s, 2.5, higher_is_better=True)
    if importlib.util.find_spec("cleanvision") is None:
        print("\nno row against CleanVision: pip install 'dreamlite-pipeline[bench]'", end="")
        return
    for number, payload in enumerate(jpegs):
        (tmp_path / f"{number:04d}.jpg").write_bytes(payload)
    from cleanvision import Imagelab

    def clean_vision() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Imagelab(data_path=str(tmp_path)).find_issues(n_jobs=1, verbose=False)

    theirs_s, fused_s = seconds_of(clean_vision, fused, rounds=2)
    bench("fused_ingest_to_cleanvision_rate", theirs_s / fused_s, 15, higher_is_better=True)


def test_a_commit_of_a_shard_against_a_raw_write(bench, jpegs: list[bytes], tmp_path: Path) -> None:
    payloads = (jpegs * 32)[:3000]

    def rows_of(shard: int) -> pa.Table:
        return schema.rows_table("images", [
            {"image_id": hashlib.sha256(f"{shard}/{number}".encode()).hexdigest(), "bytes": payload, "mime": "image/jpeg", "width": SIDE_PX,
             "height": SIDE_PX, "size_bytes": len(payload)}
            for number, payload in enumerate(payloads)
        ])  # fmt: skip

    rows = rows_of(0)
    lake, counter = Lake(tmp_path / "lake"), iter(range(100))

    def raw() -> None:
        with open(tmp_path / "raw.bin", "wb") as handle:
            for payload in payloads:
                handle.write(payload)
        os.unlink(tmp_path / "raw.bin")

    def shard() -> None:
        os.unlink(write_table("images", rows, tmp_path, f"{next(counter)}"))

    raw_s, shard_s = seconds_of(raw, shard, rounds=5)
    bench("shard_write_to_raw_write_cpu", shard_s / raw_s, 1.25)

    def staged(key: str, part: pa.Table) -> Written:
        return Written({"images": write_table("images", part, lake.staging, key)}, len(part), 0)

    commit(lake, [staged("a", rows.slice(0, 100))])
    # Alone, as the first results of a build are, and eight together, as they are where workers are faster than commits.
    for name, count in (("shard_commit_to_raw_write_cpu", 1), ("shard_commit_of_eight_to_raw_write_cpu", 8)):
        written = [staged(f"{count}-{number}", rows_of(10 * count + number)) for number in range(count)]
        started = time.process_time()
        commit(lake, written)
        register_s = (time.process_time() - started) / count
        print(f"\n{register_s:.3f} CPU-s to find known ids and to commit, {raw_s:.3f} to write {len(rows)} files of one shard raw", end="")
        bench(name, (shard_s + register_s) / raw_s, 1.25)


# --- duplicates ----------------------------------------------------------------------------------------------------------

MILLION = 1_000_000


@pytest.fixture(scope="module")
def hashes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A million hashes; of 50,000 the place of another hash from which it was made by up to three flipped bits."""
    rng = np.random.default_rng(0)
    found = rng.integers(0, 2**64, MILLION, dtype=np.uint64)
    origin = rng.choice(MILLION - 50_000, 50_000, replace=False)
    planted = found[origin]
    for _ in range(3):
        flipped = rng.random(len(planted)) < 0.8
        planted[flipped] ^= np.uint64(1) << rng.integers(0, 64, flipped.sum()).astype(np.uint64)
    found[-50_000:] = planted
    return found, origin, planted


def test_near_pairs_in_a_million_hashes(bench, hashes: tuple) -> None:
    found, origin, planted = hashes
    distinct = np.unique(found)
    started = time.process_time()
    left, right, bits = pairs_within(distinct, 3)
    bench("near_pairs_1m_cpu_s", time.process_time() - started, 3.0)
    ends = np.sort(np.searchsorted(distinct, np.stack([found[origin], planted])), axis=0)
    wanted = np.unique((ends[0] * MILLION + ends[1])[ends[0] != ends[1]])
    bench("near_pairs_recall", np.isin(wanted, left * MILLION + right).mean(), 1.0, higher_is_better=True)
    assert (np.bitwise_count(distinct[left] ^ distinct[right]) == bits).all() and bits.max() <= 3
    new = np.random.default_rng(1).integers(0, 2**64, 10_000, dtype=np.uint64)
    new[:500] = found[:500] ^ np.uint64(5)
    started = time.process_time()
    one, _, _ = pairs_between(new, found, 3)
    bench("near_pairs_10k_to_1m_cpu_s", time.process_time() - started, 0.3)
    assert len(np.unique(one)) >= 500


def test_ten_thousand_new_images_beside_a_million_grouped_ones(bench, hashes: tuple, tmp_path: Path) -> None:
    """From the lake's columns to the rows of the new ones: reading the hashes of the history is the first part of it, to meet its
    groups in the lake the second."""
    lake, version = Lake(tmp_path), op_version(Duplicates)
    values = pa.table({"n": np.arange(MILLION), "phash": hashes[0]})
    lake.write(lambda connection: connection.register("known", values) and connection.execute(
        f"INSERT INTO op_duplicates BY NAME SELECT sha256('i' || n) AS subject_id, '{version}' AS op_version, sha256('i' || n) AS group_id, "
        "'first' AS kind, 0 AS distance, substr(sha256('p' || n), 1, 32) AS pixel_hash, phash FROM known"
    ) and None)  # fmt: skip
    rng = np.random.default_rng(2)
    rows = pa.table({
        "subject_id": [f"new{number:05d}" for number in range(10_000)], "pixel_hash": [f"{number:032x}" for number in range(10_000)],
        "phash": pa.array(np.concatenate([hashes[0][:500] ^ np.uint64(9), rng.integers(0, 2**64, 9_500, dtype=np.uint64)])),
        "min_side_px": pa.array(np.full(10_000, 256, np.int32)),
    })  # fmt: skip
    pq.write_table(rows, tmp_path / "new.parquet")
    started = time.process_time()
    history = comparisons.grouped_before(lake, version, [str(tmp_path / "new.parquet")])
    loaded_s = time.process_time() - started
    found = Duplicates(history)(rows)
    grouped_s = time.process_time() - started - loaded_s
    assert sum(kind == "near" for kind in found["kind"].to_pylist()) >= 500
    bench("group_10k_beside_1m_cpu_s", grouped_s, 0.3)
    bench("load_1m_grouped_cpu_s", loaded_s, 1.0)


# --- deciding ------------------------------------------------------------------------------------------------------------


def test_a_new_threshold_for_a_million_rows(bench, million: Lake) -> None:  # noqa: F811
    parameters = RefreshSettings().policy.model_dump() | {"sources": [f"s{number}" for number in range(5)], "seed": "0", "benchmarks": ()}
    policy = read_policy("t2i")
    started = time.perf_counter()
    judge(million, policy, parameters)
    bench("join_candidates_1m_s", time.perf_counter() - started, 30.0)
    thresholds = iter(np.linspace(0.51, 0.6, 5).tolist())
    times = []
    for threshold in thresholds:
        started = time.perf_counter()
        judged, outcome = judge(million, policy, {**parameters, "min_sharpness": threshold})
        times.append(time.perf_counter() - started)
    rejected = next(count for rule, _, count in outcome if rule.name == "sharp")
    assert len(judged) == MILLION and abs(rejected / MILLION - 0.6) < 0.01
    bench("redecide_1m_s", min(times), 1.0)
    plan = million.query(f"EXPLAIN {policy.candidates}", {"sources": parameters["sources"]})["explain_value"].to_pylist()
    assert "bytes" not in " ".join(plan)


# --- executors -----------------------------------------------------------------------------------------------------------


def tree_cpu_s() -> float:
    """CPU seconds of this process and all its descendants, those that ended included."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            spent = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


def examine_file(path: str) -> int:
    """A shard of real ingest work: every image of one file."""
    payloads = pa.ipc.open_file(path).read_all()["payload"]
    answers, quality = Ingest(IngestSettings()).examine([payload.as_py() for payload in payloads])
    return sum(answer["error"] is None for answer in answers) + len(quality)


@pytest.mark.parametrize(("name", "target"), [("local", 1.05), ("ray", 1.25)])
def test_the_cpu_of_an_executor_against_a_plain_loop(bench, jpegs: list[bytes], tmp_path: Path, name: str, target: float) -> None:
    """4,096 images in 16 shards. Starting workers is left out for both, as a run of many steps pays it once: it is printed."""
    files = []
    for number in range(16):
        path = tmp_path / f"{number}.arrow"
        part = pa.table({"payload": pa.array([jpegs[(number + index) % len(jpegs)] for index in range(256)], pa.binary())})
        with pa.ipc.new_file(path, part.schema) as writer:
            writer.write_table(part)
        files.append(str(path))
    executor = executors.local(2) if name == "local" else executors.ray(2)
    with executor:
        started = tree_cpu_s()
        list(executor.map(examine_file, files[:2]))  # workers start and import
        print(f"\n{name}: {tree_cpu_s() - started:.1f} CPU-s to start and to warm up", end="")
        ratios = []
        for _ in range(2):
            started = tree_cpu_s()
            inline = [examine_file(path) for path in files]
            inline_s = tree_cpu_s() - started
            started = tree_cpu_s()
            assert list(executor.map(examine_file, files)) == inline
            ratios.append((tree_cpu_s() - started) / inline_s)
    bench(f"{name}_cpu_to_inline", min(ratios), target)


# --- refresh -------------------------------------------------------------------------------------------------------------


def test_a_refresh_with_one_percent_new_rows(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamlite_data import images
    from dreamlite_data.operators import caption, quality, verify

    decodes = []
    real, real_stored = images.decode, images.decode_stored
    monkeypatch.setattr(images, "decode", lambda *given: decodes.append(1) or real(*given))
    for module in (caption, quality, verify):
        monkeypatch.setattr(module, "decode_stored", lambda payload: decodes.append(1) or real_stored(payload))
    folder = tmp_path / "own"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def add(first: int, count: int) -> None:
        for number in range(first, first + count):
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number:05d}.png")

    settings = RefreshSettings(
        scenes={"t2i_rows": 0, "edit_rows": 0}, photos={"enabled": False}, extra_sources=[{"name": "own", "kind": "folder", "path": folder}],
        policy={"allow_unanimous": ["*"]},
    )  # fmt: skip
    lake, executor = Lake(tmp_path / "lake"), executors.local()

    def counted() -> int:
        decodes.clear()
        refresh.ingest(lake, settings, executor)
        for names in (["quality"], ["edit", "caption"], ["verify"]):
            refresh.measure(lake, settings, executor, names)
        refresh.curate(lake, settings, 0)
        return len(decodes)

    add(0, 1000)
    full = counted()
    add(1000, 10)
    bench("decodes_of_1_percent_new_share", counted() / full, 0.03)
    bench("decodes_of_nothing_new", counted(), 0)
    assert full >= 1000


INGEST_AND_MEASURE = """
import re, sys
from dreamlite_data import executors, refresh
from dreamlite_data.lake import Lake
from dreamlite_data.settings import RefreshSettings
settings = RefreshSettings.model_validate_json(sys.argv[2])
lake = Lake(sys.argv[1])
# Not ru_maxrss, which a process inherits from the one that started it; and no import for it, for the start is timed.
peak_mb = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
peaks = [peak_mb()]
refresh.ingest(lake, settings, executors.local())
peaks.append(peak_mb())
refresh.measure(lake, settings, executors.local(), ["quality"])
peaks.append(peak_mb())
print(*peaks)
"""


@pytest.mark.parametrize(("kind", "name"), [("folder", "ingest_peak_memory_100k_to_10k"), ("webdataset", "peak_memory_100k_to_10k_rows")])
def test_peak_memory_does_not_grow_with_the_rows(bench, tmp_path: Path, kind: str, name: str) -> None:
    """Peak resident memory, of a process of its own, of ingest, quality and duplicates over ten times as many rows: a folder of 64 px
    JPEGs, where every file is a unit, and shards of one size."""
    peaks = {}
    for rows in (10_000, 100_000):
        path = tmp_path / f"{kind}{rows}"
        (write_small_jpegs if kind == "folder" else write_png_shards)(path, rows)
        settings = RefreshSettings(
            scenes={"t2i_rows": 0, "edit_rows": 0}, photos={"enabled": False}, extra_sources=[{"name": "own", "kind": kind, "path": path}],
        )  # fmt: skip
        command = [sys.executable, "-c", INGEST_AND_MEASURE, str(tmp_path / f"lake{rows}"), settings.model_dump_json()]
        peaks[rows] = [float(word) for word in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]
        print(f"\n{rows} rows of {kind}: peak at start, after ingest, after measuring {peaks[rows]} MB", end="", flush=True)
        assert peaks[rows][0] < peaks[rows][-1]
    bench(name, peaks[100_000][-1] / peaks[10_000][-1], 1.15)


def write_small_jpegs(folder: Path, rows: int) -> None:
    """A flat folder of JPEG files of 64 px, all different."""
    folder.mkdir(parents=True)
    for number in range(rows):
        cells = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        pixels = np.ascontiguousarray(cells.repeat(8, 0).repeat(8, 1))
        (folder / f"{number:07d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, 80, "RGB", "420"))


def write_png_shards(folder: Path, rows: int, shard_rows: int = 1000) -> None:
    """WebDataset shards of tiny, all different PNG files."""
    import tarfile

    folder.mkdir(parents=True)
    for start in range(0, rows, shard_rows):
        with tarfile.open(folder / f"{start:07d}.tar", "w") as tar:
            for number in range(start, start + shard_rows):
                buffer = io.BytesIO()
                noise = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
                for suffix, payload in (("png", buffer.getvalue()), ("txt", f"noise number {number}".encode())):
                    member = tarfile.TarInfo(f"{number:07d}.{suffix}")
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))


# --- the same job elsewhere ----------------------------------------------------------------------------------------------

DATA_JUICER_RECIPE = """
project_name: side_by_side
dataset_path: {folder}/rows.jsonl
export_path: {folder}/out/rows.jsonl
np: 1
open_tracer: false
use_cache: false
op_fusion: true
process:
  - image_shape_filter: {{min_width: 64, min_height: 64}}
  - image_aspect_ratio_filter: {{min_ratio: 0.333, max_ratio: 3.0}}
  - image_size_filter: {{min_size: "1kb"}}
  - image_deduplicator: {{method: phash}}
"""


def test_the_same_job_in_data_juicer(bench, tmp_path: Path) -> None:
    """Duplicates by perceptual hash, and filters of shape, aspect and size, over the same files with one process each, by wall time.

    Theirs keeps pictures of equal pHash once; Data-Juicer has no measure of a picture's quality that needs no weights beyond these,
    while ours measures sharpness, exposure, entropy and colour besides, stores every picture and groups within 3 bits. Operators that
    can share a decode are fused in theirs, and its cache and tracer are off. In its venv torchvision may be a stand-in of empty
    modules (infra/data_juicer_venv.sh): imagededup imports it for networks that are not run here, which only makes its start shorter.
    The first row is what a user waits for; the second leaves start-up out for both, by running each over few files too."""
    python = os.environ.get("DATA_JUICER_PYTHON")
    if not python:
        pytest.skip("no row against Data-Juicer: set DATA_JUICER_PYTHON to the python of the venv that infra/data_juicer_venv.sh makes")

    def theirs(folder: Path) -> list[str]:
        rows = [json.dumps({"text": f"<__dj__image> a photo {file.stem}", "images": [str(file)]}) for file in sorted(folder.glob("*.jpg"))]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
        (folder / "recipe.yaml").write_text(DATA_JUICER_RECIPE.format(folder=folder))
        return [str(Path(python).with_name("dj-process")), "--config", str(folder / "recipe.yaml")]

    def ours(folder: Path) -> list[str]:
        settings = RefreshSettings(
            scenes={"t2i_rows": 0, "edit_rows": 0}, photos={"enabled": False},
            extra_sources=[{"name": "own", "kind": "folder", "path": folder}],
        )  # fmt: skip
        return [sys.executable, "-c", INGEST_AND_MEASURE, str(folder / ".lake"), settings.model_dump_json()]

    payloads = photo_jpegs(64)
    spent = {}
    for count in (50, 1050):
        for name, command_of in (("Data-Juicer", theirs), ("ours", ours)):
            folder = tmp_path / f"{name}{count}"
            folder.mkdir()
            for number in range(count):
                (folder / f"{number:05d}.jpg").write_bytes(payloads[number % len(payloads)] + number.to_bytes(4, "big"))
            command, before, started = command_of(folder), resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=folder)
            spent[name, count] = time.perf_counter() - started
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f"\n{count} images, {name}: {spent[name, count]:.1f} s, {cpu_s:.1f} CPU-s", end="", flush=True)
    bench("data_juicer_wall_to_ours", spent["Data-Juicer", 1050] / spent["ours", 1050], 5.0, higher_is_better=True)
    marginal = [spent[name, 1050] - spent[name, 50] for name in ("Data-Juicer", "ours")]
    bench("data_juicer_wall_to_ours_without_start", marginal[0] / marginal[1], 5.0, higher_is_better=True)
