"""Find a reward checkpoint by name: a local directory, or a model of the Hugging Face hub at a fixed revision.
Fetches weights as .safetensors or .pth and small text files only; nothing that could hold code."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import os
from pathlib import Path

from dreamlite_data.rewards.stored import DTYPES, INDEX_FILE, RewardCheckpointError, StoredTensor, read_headers, weight_files

WEIGHTS = ("*.safetensors", "*.pth", INDEX_FILE)
BASE_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
)  # fmt: skip
"""What a base model lends a checkpoint that was published as weights alone, as HPSv3 was."""

OWN_FILES = ("reward_spec.json", "SHA256SUMS")


@dataclasses.dataclass(frozen=True)
class HubModel:
    """A model of the hub; `revision` is a commit, tag or branch."""

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


def parse_model(text: str, what: str = "a reward checkpoint") -> Path | HubModel:
    """`text` as the local directory that it names, or else as `org/name@revision`. Raises RewardCheckpointError, which says `what` is sought."""
    if Path(text).is_dir():
        return Path(text)
    name, at, revision = text.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or not all(name.split("/")):
        raise RewardCheckpointError(f"there is no directory {text}; give one that holds {what}, or a hub id org/name@revision")
    if not at or not revision:
        raise RewardCheckpointError(
            f"there is no directory {text}; if it is a hub id, say at which revision, as {name}@COMMIT, for the weights under a name can change"
        )
    return HubModel(name, revision)


def checkpoint_directory(model: str, base: str | None = None) -> Path:
    """The local directory of a checkpoint, fetched from the hub where `model` is an id.

    A checkpoint published as weights alone gets config and tokenizer from `base` (a directory or hub id), by links in a
    directory named after both commits. Raises RewardCheckpointError where something is missing or cannot be reached.
    """
    found = parse_model(model)
    if isinstance(found, Path):
        return found
    return _with_base(found, fetch(found, (*WEIGHTS, *BASE_FILES, *OWN_FILES)), base)


def checkpoint_headers(model: str, base: str | None = None) -> tuple[Path, dict[str, StoredTensor]]:
    """A directory with config and tokenizer, and the headers of the weights. Of a hub model the weights are not fetched,
    only their headers (a range of each .safetensors file)."""
    found = parse_model(model)
    if isinstance(found, Path):
        return found, read_headers(weight_files(found))
    folder = fetch(found, (*BASE_FILES, *OWN_FILES))
    return _with_base(found, folder, base), _remote_headers(found, folder.name)


def fetch(model: HubModel, patterns: tuple[str, ...], ignore: tuple[str, ...] = ("*/*",)) -> Path:
    """The directory of a hub model with the files that fit a pattern; without `ignore`, those at its top. Raises RewardCheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(model.repository, revision=model.revision, allow_patterns=list(patterns), ignore_patterns=list(ignore))
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _unreachable(model, error) from error


def _unreachable(model: HubModel, error: Exception) -> RewardCheckpointError:
    why = " ".join(str(error).split())[:200]
    return RewardCheckpointError(
        f"{model} cannot be fetched from the hub ({type(error).__name__}: {why}); check the name and the network, set HF_TOKEN if it is "
        "gated, or download it and give its directory"
    )


def _with_base(model: HubModel, folder: Path, base: str | None) -> Path:
    if (folder / "config.json").exists():
        return folder
    if base is None:
        raise RewardCheckpointError(
            f"{model} holds weights but no config.json; name the base model it was trained from with --base, "
            "for HPSv3 --base Qwen/Qwen2-VL-7B-Instruct@COMMIT"
        )
    from huggingface_hub import constants

    given = parse_model(base)
    lent = given if isinstance(given, Path) else fetch(given, BASE_FILES)
    name = lent.name if isinstance(given, HubModel) else f"local-{hashlib.sha256(str(lent.resolve()).encode()).hexdigest()}"
    joined = Path(constants.HF_HOME) / "dreamlite" / f"{model.repository.replace('/', '--')}@{folder.name[:12]}+{name[:18]}"
    joined.mkdir(parents=True, exist_ok=True)
    files = {path.name: path for path in lent.iterdir() if path.name in BASE_FILES} | {path.name: path for path in folder.iterdir()}
    for file_name, path in files.items():
        if not (joined / file_name).exists():
            (joined / file_name).unlink(missing_ok=True)  # a link whose target is gone
            os.symlink(path.resolve(), joined / file_name)
    return joined


def _remote_headers(model: HubModel, commit: str) -> dict[str, StoredTensor]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, SafetensorsParsingError

    api, found = HfApi(), {}
    try:
        names = [name for name in api.list_repo_files(model.repository, revision=commit) if "/" not in name]
        weights = fnmatch.filter(names, "*.safetensors")
        if not weights:
            raise RewardCheckpointError(
                f"{model} has no .safetensors file, and the header of another cannot be read from afar; download it and give its directory"
            )
        for name in weights:
            parsed = api.parse_safetensors_file_metadata(model.repository, name, revision=commit)
            found |= {key: StoredTensor(tuple(info.shape), DTYPES[info.dtype]) for key, info in parsed.tensors.items()}
    except (HfHubHTTPError, SafetensorsParsingError, OSError) as error:
        raise _unreachable(model, error) from error
    return found
