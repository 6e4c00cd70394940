"""Start from a checkpoint that another made, such as a released one: check it, state its facts, bring it into our layout.
Its weights are linked, not copied; where they come from and under which licence goes with every checkpoint after it."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from diffusers import DreamLiteUNetModel, FlowMatchEulerDiscreteScheduler
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dreamlite_data.rewards.hub import HubModel, fetch, parse_model
from dreamlite_data.rewards.stored import RewardCheckpointError, read_headers, shards
from trainers.conditioning import HiddenState, check_drop_lengths, encoder_grid_px
from trainers.export.settings import RELEASE_LICENCE
from trainers.flow import SCHEDULER_CONFIG
from trainers.model import FACTS_FILE, latent_scale, load_facts, read_json, write_facts
from trainers.processor import SquareImageProcessor
from trainers.settings import StartSettings

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""Parts with weights, and the stem of their files."""
FILES = ("model_index.json", FACTS_FILE, "README.md", "*/*.json", "*/*.txt", "*/*.jinja", *(f"{part}/{stem}*.safetensors" for part, stem in WEIGHTS.items()))  # fmt: skip
"""What is fetched of a hub model: text and safetensors, nothing that could hold code."""
IGNORED = ("*/*/*", "*.fp16.safetensors", "*.bf16.safetensors")
RELEASED_HIDDEN_STATE = "pre_norm"
"""What the released weights were trained on: transformers 4.57 hands out states before the final norm."""


def find_checkpoint(model: str) -> tuple[Path, str]:
    """(local folder, origin) of a folder or of a hub id `org/name@revision`, which is fetched. The origin of a hub model names its
    commit. Raises ValueError where it is not there or cannot be reached."""
    found = parse_model(model, "a checkpoint in diffusers layout (model_index.json, unet/, vae/, text_encoder/)")
    if not isinstance(found, HubModel):
        return found.resolve(), str(found.resolve())
    try:
        folder = fetch(found, FILES, IGNORED)
    except RewardCheckpointError as error:
        raise ValueError(f"{error}. Downloads are off unless HF_HUB_OFFLINE=0 is set") from error
    return folder, f"{found.repository}@{folder.name}"


def import_checkpoint(settings: StartSettings, output: Path) -> dict[str, Any]:
    """Write `output`, a checkpoint folder of our layout with the weights linked, and return its facts (dreamlite.json).

    Raises ValueError in one sentence for a part that is missing or pickled, a UNet configuration that this code does not build,
    weights that do not fit it, a distilled model, and settings that contradict what the checkpoint says.
    """
    source, origin = find_checkpoint(settings.checkpoint)
    _check_parts(source)
    config = _check_unet(source)
    vae, encoder = read_json(source / "vae" / "config.json"), read_json(source / "text_encoder" / "config.json")
    width = encoder.get("text_config", encoder).get("hidden_size")
    if config.get("encoder_hid_dim") != width:
        raise ValueError(f"{source}: the UNet reads states of width {config.get('encoder_hid_dim')}, but its text encoder's are {width} wide")
    _check_scheduler(source)
    if config.get("in_channels") != vae.get("latent_channels"):
        raise ValueError(f"{source}: the UNet takes {config.get('in_channels')} channels, but its VAE has {vae.get('latent_channels')}")
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for part in (*WEIGHTS, "scheduler"):
        (staging / part).symlink_to((source / part).resolve(), target_is_directory=True)
    tokenizer, grid_px = _write_processor(source, staging)
    stated = load_facts(source) if (source / FACTS_FILE).is_file() else {}
    facts = {
        "stage": "start",
        "hidden_state": _hidden_state(source, stated, settings),
        "size_px": _size_px(source, stated, settings, config, latent_scale(vae)),
        "encoder_image_px": grid_px,
        "distilled_steps": None,
        **{f"drop_{task}": length for task, length in check_drop_lengths(tokenizer).items()},
        "weights": weights_facts(source, origin, stated, settings),
    }
    write_facts(staging, facts, distilled=False)
    shutil.rmtree(output, ignore_errors=True)
    staging.rename(output)
    return facts


def weights_facts(source: Path, origin: str, stated: dict[str, Any], settings: StartSettings) -> dict[str, Any]:
    """{origin, licence, derived_from_release} of a checkpoint: what its dreamlite.json says, else the licence of its model card or of
    the settings. A checkpoint that says nothing counts as derived from the release, for nothing else has its layout.

    Raises ValueError where the settings name another licence than the checkpoint does.
    """
    told = stated.get("weights") or {}
    licence = told.get("licence") or card_licence(source)
    if not licence and stated:  # trained from scratch by this project: whoever did chooses
        return {"origin": origin, "licence": settings.licence, "derived_from_release": False}
    if licence and settings.licence and settings.licence.lower() != licence.lower():
        raise ValueError(f"start.licence is {settings.licence!r}, but {source} says that its weights are under {licence!r}: leave it out")
    licence = licence or settings.licence or RELEASE_LICENCE
    if licence.lower() == RELEASE_LICENCE.lower():
        licence = RELEASE_LICENCE
    return {
        "origin": told.get("origin", origin),
        "licence": licence,
        "derived_from_release": told.get("derived_from_release", licence == RELEASE_LICENCE),
    }


def card_licence(source: Path) -> str | None:
    """`license` in the metadata of a model card (README.md between two lines of ---); None where there is none."""
    path = source / "README.md"
    block = re.match(r"---\s*\n(.*?)\n---", path.read_text("utf-8", errors="replace"), re.DOTALL) if path.is_file() else None
    try:
        metadata = yaml.safe_load(block.group(1)) if block else None
    except yaml.YAMLError:
        return None
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return str(licence) if licence else None


def _check_parts(source: Path) -> None:
    missing = [f"{part}/" for part in (*WEIGHTS, "scheduler") if not (source / part).is_dir()]
    missing += [] if (source / "tokenizer").is_dir() or (source / "processor").is_dir() else ["tokenizer/ or processor/"]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}: give a checkpoint in diffusers layout, as DreamLitePipeline saves it")
    for part in WEIGHTS:
        if not _weight_files(source, part):
            pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in (source / part).glob(pattern))
            what = f"weights as a pickle ({pickled[0]}), which can run code" if pickled else "no weights"
            raise ValueError(f"{source / part} holds {what}: save them as safetensors ({WEIGHTS[part]}.safetensors)")
    index = source / "model_index.json"
    if index.is_file() and read_json(index).get("_class_name") == "DreamLiteMobilePipeline":
        raise ValueError(
            f"{source} is a distilled model: its network steps to images and is no velocity to train on. Start from the base model it was "
            "distilled from; an adapter trained there loads into it too"
        )


def _weight_files(source: Path, part: str) -> list[Path]:
    whole = source / part / f"{WEIGHTS[part]}.safetensors"
    index = whole.with_name(whole.name + ".index.json")
    if index.is_file():
        return [index.parent / name for name in shards(index)]
    return [whole] if whole.is_file() else []


def _check_unet(source: Path) -> dict[str, Any]:
    """Its configuration, after a look at the headers of its weights: diffusers would draw a missing tensor at random without a word."""
    path = source / "unet" / "config.json"
    config = {name: value for name, value in read_json(path).items() if not name.startswith("_")}
    known = set(inspect.signature(DreamLiteUNetModel.__init__).parameters) - {"self"}
    if unknown := sorted(config.keys() - known):
        raise ValueError(f"{path} sets {', '.join(unknown)}, which DreamLiteUNetModel of this diffusers does not know: it is another network")
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in DreamLiteUNetModel.from_config(config).state_dict().items()}
    found = {name: tuple(stored.shape) for name, stored in read_headers(_weight_files(source, "unet")).items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{source / 'unet'}: {len(wrong)} of {len(wanted)} tensors do not fit its config.json, for one {name}, which is "
            f"{list(found[name]) if name in found else 'absent'} and should be {list(wanted[name]) if name in wanted else 'absent'}"
        )
    return config


def _check_scheduler(source: Path) -> None:
    path = source / "scheduler" / "scheduler_config.json"
    stated, defaults = read_json(path), inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    for name, value in SCHEDULER_CONFIG.items():
        found = stated.get(name, defaults[name].default)
        if found != value and name != "shift":  # the static shift is not read where the shift is dynamic
            raise ValueError(f"{path} sets {name} to {found}, but this project trains and draws with {value}, as the release does")


def _write_processor(source: Path, target: Path) -> tuple[PreTrainedTokenizerFast, int]:
    """Write tokenizer/ and processor/ as our checkpoints have them; returns the tokenizer and the side (px) at which sources are encoded."""
    folders = [source / name for name in ("tokenizer", "processor") if (source / name).is_dir()]
    whole = next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)
    if whole is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(whole)
    else:  # vocabulary and merges: transformers makes the fast tokenizer of them
        tokenizer = AutoTokenizer.from_pretrained(folders[0])
    tokenizer.save_pretrained(target / "tokenizer")
    configured = [folder for folder in (source / "processor", source / "tokenizer") if any(folder.glob("*processor_config.json"))]
    if not configured:
        raise ValueError(f"{source} holds no preprocessor_config.json in processor/: it says how a source image is cut into patches")
    images = Qwen2VLImageProcessorPil.from_pretrained(configured[0])
    SquareImageProcessor(images, tokenizer).save_pretrained(target / "processor")
    return tokenizer, encoder_grid_px(images)


def _hidden_state(source: Path, stated: dict[str, Any], settings: StartSettings) -> str:
    found = stated.get("hidden_state")
    if found is None:
        return settings.hidden_state or RELEASED_HIDDEN_STATE
    if found not in get_args(HiddenState) or settings.hidden_state not in (None, found):
        raise ValueError(f"{source} was trained with hidden_state = {found}, but start.hidden_state is {settings.hidden_state}: leave it out")
    return found


def _size_px(source: Path, stated: dict[str, Any], settings: StartSettings, config: dict[str, Any], scale: int) -> int:
    own = int(stated.get("size_px") or config.get("sample_size", 0) * scale)
    size = settings.size_px or own
    step = scale * 2 ** (len(config["block_out_channels"]) - 1)
    if not size or size % step:
        raise ValueError(f"{source} works on sides that are multiples of {step} px, not on {size} px: change start.size_px")
    return size
