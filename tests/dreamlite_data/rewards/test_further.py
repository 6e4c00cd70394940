"""The further scorers give the numbers of their original formulas from checkpoints in their original layouts,
with gradients to images, and refuse what does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from dreamlite_data.rewards import KINDS, RewardCheckpointError, Scorer, load_scorer, load_scorer_packer
from dreamlite_data.rewards.image_reward import MEAN, STD
from dreamlite_data.rewards.squares import CLIP_MEAN, CLIP_STD, Square, read_square
from tests.dreamlite_data.rewards import tiny_scorers
from tests.dreamlite_data.rewards.tiny_scorers import SIDE_PX

FURTHER = KINDS[1:]
PROMPTS = ["a red circle", "the large blue square on a photo", "green"]
SIZES = [(28, 28), (61, 40), (33, 90)]
TOLERANCE = 2e-5


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng([seed, width, height])
    coarse = Image.fromarray(rng.integers(0, 255, (7, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [picture(*size) for size in SIZES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("further")
    made = {kind: root / kind for kind in FURTHER}
    for folder in made.values():
        folder.mkdir()
    tiny_scorers.tiny_clip_model(made["clip"])
    tiny_scorers.tiny_clip_model(made["pickscore"], seed=1)
    tiny_scorers.tiny_hpsv2(made["hpsv2"])
    tiny_scorers.tiny_image_reward(made["imagereward"])
    tiny_scorers.tiny_clip_model(made["aesthetic"], seed=2)
    tiny_scorers.save_laion_head(made["aesthetic"], tiny_scorers.laion_head(12))
    return made


@pytest.fixture(scope="module")
def scorers(folders: dict[str, Path]) -> dict[str, Scorer]:
    return {kind: load_scorer(kind, folder) for kind, folder in folders.items()}


def normalised(pixels: np.ndarray) -> torch.Tensor:
    values = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float()[None] / 255
    return (values - torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)) / torch.tensor(CLIP_STD).view(1, 3, 1, 1)


def clip_ids(scorer: Scorer, prompt: str) -> torch.Tensor:
    return torch.tensor([scorer.packer.tokenizer(prompt).input_ids])


# --- the numbers of the originals ------------------------------------------------------------------------------------


def test_clip_score_and_pickscore_are_the_library_s_cosine_on_their_scales(folders, scorers):
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX})
    for kind, seed, scale in (("clip", 0, 100.0), ("pickscore", 1, float(torch.tensor(2.0).exp()))):
        original = tiny_scorers.tiny_clip_model(folders[kind], seed)
        wanted = []
        with torch.no_grad():
            for image, prompt in zip(PICTURES, PROMPTS, strict=True):
                pixels = processor(images=[image], return_tensors="pt").pixel_values
                outputs = original(pixel_values=pixels, input_ids=clip_ids(scorers[kind], prompt))
                wanted.append(scale * float(outputs.image_embeds[0] @ outputs.text_embeds[0]))
        np.testing.assert_allclose(scorers[kind].score(PICTURES, PROMPTS).mu, wanted, rtol=0, atol=100 * TOLERANCE)


def test_hpsv2_equals_open_clip_s_formula_on_padded_images(folders, scorers):
    plain = tiny_scorers.randomise(tiny_scorers.OpenClip(len(scorers["hpsv2"].packer.tokenizer)))
    wanted = []
    for image, prompt in zip(PICTURES, PROMPTS, strict=True):
        values = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()[None] / 255
        scale = SIDE_PX / max(image.size)
        size = round(image.height * scale), round(image.width * scale)
        values = torch.nn.functional.interpolate(values, size, mode="bicubic", antialias=True) if scale != 1 else values
        canvas = torch.zeros(1, 3, SIDE_PX, SIDE_PX)
        top, left = (SIDE_PX - size[0]) // 2, (SIDE_PX - size[1]) // 2
        canvas[..., top : top + size[0], left : left + size[1]] = values
        canvas = (canvas - torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)) / torch.tensor(CLIP_STD).view(1, 3, 1, 1)
        wanted.append(float(plain.cosine(canvas, clip_ids(scorers["hpsv2"], prompt))[0]))
    np.testing.assert_allclose(scorers["hpsv2"].score(PICTURES, PROMPTS).mu, wanted, rtol=0, atol=TOLERANCE)
    assert np.ptp(wanted) > 0.05  # the oracle tells the rows apart


def test_imagereward_equals_blip_s_formula_and_its_padding_is_not_read(folders, scorers):
    plain = tiny_scorers.tiny_image_reward(folders["imagereward"])
    scorer = scorers["imagereward"]
    wanted = []
    for image, prompt in zip(PICTURES, PROMPTS, strict=True):
        raw = plain.raw(normalised(Square(SIDE_PX, "crop", "round").pixels(image)), clip_ids(scorer, prompt))
        wanted.append((float(raw[0]) - MEAN) / STD)
    np.testing.assert_allclose(scorer.score(PICTURES, PROMPTS).mu, wanted, rtol=0, atol=TOLERANCE)
    assert np.ptp(wanted) > 0.05


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_an_aesthetic_head_reads_the_embedding_of_length_one(tmp_path, tower):
    original = tiny_scorers.tiny_clip_model(tmp_path) if tower == "clip" else tiny_scorers.tiny_siglip_model(tmp_path)
    head = tiny_scorers.laion_head(12 if tower == "clip" else 16)
    tiny_scorers.save_laion_head(tmp_path, head)
    scorer = load_scorer("aesthetic", tmp_path)
    pixels = torch.cat([scorer.packer.square.of_pixels(scorer.packer.square.pixels(image)[None]) for image in PICTURES])
    with torch.no_grad():
        found = original.get_image_features(pixel_values=pixels).pooler_output
        wanted = head(found / found.norm(dim=-1, keepdim=True))[:, 0]
        unnormalised = head(found)[:, 0]
    np.testing.assert_allclose(scorer.score(PICTURES, [None] * 3).mu, wanted, rtol=0, atol=TOLERANCE)
    assert (wanted - unnormalised).abs().max() > 1e-3  # the length matters


@pytest.mark.parametrize("size", [(28, 28), (61, 40), (40, 61), (29, 200), (301, 299)])
def test_squares_are_the_library_s(size):
    image = picture(*size)
    clip = CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX})
    siglip = SiglipImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX})
    for processor, square in ((clip, Square(SIDE_PX)), (siglip, Square(SIDE_PX, "squash", mean=(0.5,) * 3, std=(0.5,) * 3))):
        wanted = processor(images=[image], return_tensors="pt").pixel_values
        np.testing.assert_allclose(square.of_pixels(square.pixels(image)[None]), wanted, rtol=0, atol=1e-6)


def test_a_square_that_no_scorer_makes_is_refused(folders, tmp_path):
    config = (folders["clip"] / "preprocessor_config.json").read_text()
    for changed, words in (
        (config.replace('"resample": 3', '"resample": 2'), "resample is 2"),
        (config.replace('"shortest_edge": 28', '"shortest_edge": 32'), "no square"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(changed)
        with pytest.raises(RewardCheckpointError, match=words):
            read_square(tmp_path)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FURTHER)
def test_gradients_reach_every_image_and_no_other(scorers, kind):
    scorer = scorers[kind]
    images = (
        torch.stack([torch.from_numpy(np.asarray(picture(SIDE_PX, SIDE_PX, seed)).copy()) for seed in range(3)]).permute(0, 3, 1, 2) / 255
    )
    exact = scorer.score([Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in images], PROMPTS).mu
    images.requires_grad_(True)
    mu = scorer.differentiable(images, PROMPTS, chunk_size=2)
    np.testing.assert_allclose(
        mu.detach(), exact, rtol=0, atol=100 * TOLERANCE if kind == "clip" else TOLERANCE
    )  # no resize: the same pixels
    (gradient,) = torch.autograd.grad(mu.sum(), images, retain_graph=True)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    (own,) = torch.autograd.grad(mu[1], images)
    assert own[1].norm() > 0 and own[0].norm() == own[2].norm() == 0
    # The slope is that of the score: a small step along the gradient of one image changes it by as much.
    step = 1e-2 * gradient[0] / gradient[0].norm()
    moved = scorer.differentiable(torch.stack([images[0].detach() + sign * step for sign in (1, -1)]).clamp(-0.4, 1.4), [PROMPTS[0]] * 2)
    assert float(moved[0] - moved[1]) == pytest.approx(2e-2 * float(gradient[0].norm()), rel=0.1)


@pytest.mark.parametrize("kind", FURTHER)
def test_tensor_and_pillow_paths_agree_where_images_are_resized(scorers, kind):
    image = picture(70, 70)
    exact = scorers[kind].score([image], PROMPTS[:1]).mu[0]
    values = (torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255).requires_grad_(True)
    mu = scorers[kind].differentiable(values, PROMPTS[:1])
    spread = np.ptp(scorers[kind].score(PICTURES, PROMPTS).mu)
    assert abs(float(mu.detach()) - exact) < 0.1 * spread


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FURTHER)
def test_a_bad_row_costs_itself_only(scorers, kind):
    scorer = scorers[kind]
    good = scorer.score(PICTURES[:1], PROMPTS[:1]).mu[0]
    scores = scorer.score([b"no image", PICTURES[0], PICTURES[0]], ["a", PROMPTS[0], None])
    assert "UnidentifiedImageError" in scores.errors[0] and np.isnan(scores.mu[0])
    assert scores.errors[1] is None and scores.mu[1] == pytest.approx(good, abs=1e-4)
    if kind == "aesthetic":
        assert scores.errors[2] is None and scores.mu[2] == pytest.approx(good, abs=1e-4)
    else:
        assert "the prompt is NoneType, not text" in scores.errors[2]
    assert np.isnan(scores.log_sigma).all()


@pytest.mark.parametrize(("kind", "token"), [("clip", "</s>"), ("hpsv2", "</s>"), ("imagereward", "[SEP]")])
def test_a_spelt_out_special_token_is_harmless_text(scorers, kind, token):
    packer = scorers[kind].packer
    end = packer.tokenizer.convert_tokens_to_ids(token)
    ids, mask = packer.words([f"a {token} red circle"])
    assert (ids[0][mask[0]] == end).sum() == 1 and ids[0][mask[0]][-1] == end


def test_packing_needs_no_weights(folders, tmp_path, scorers):
    for kind in ("clip", "hpsv2", "aesthetic"):
        bare = Path(shutil.copytree(folders[kind], tmp_path / kind, ignore=shutil.ignore_patterns("*.safetensors", "*.pt", "*.pth")))
        packed = load_scorer_packer(kind, bare).pack(PICTURES, PROMPTS)
        whole = scorers[kind].packer.pack(PICTURES, PROMPTS)
        assert np.array_equal(packed.pixels, whole.pixels) and np.array_equal(packed.ids, whole.ids)


def changed_state(folder: Path, name: str, change) -> None:
    state = torch.load(folder / name, weights_only=True)
    inner = state.get("state_dict", state)
    change(inner)
    torch.save(state, folder / name)


@pytest.mark.parametrize(
    ("kind", "file", "key", "words"),
    [
        (
            "hpsv2",
            "HPS_v2.1_compressed.pt",
            "visual.transformer.resblocks.0.attn.in_proj_weight",
            "3 missing: vision_model.encoder.layers.0.self_attn",
        ),
        (
            "imagereward",
            "ImageReward.pt",
            "blip.visual_encoder.blocks.1.attn.qkv.weight",
            "1 missing: vision.encoder.layers.1.self_attn.qkv.weight",
        ),
    ],
)
def test_weights_must_fit_key_by_key(folders, tmp_path, kind, file, key, words):
    def fresh(name: str) -> Path:
        return Path(shutil.copytree(folders[kind], tmp_path / name))

    lacking = fresh("lacking")
    changed_state(lacking, file, lambda state: state.pop(key))
    with pytest.raises(RewardCheckpointError, match=words):
        load_scorer(kind, lacking)
    strange = fresh("strange")
    changed_state(strange, file, lambda state: state.update({"adapter.weight": torch.zeros(1)}))
    with pytest.raises(RewardCheckpointError, match="1 unexpected: adapter.weight"):
        load_scorer(kind, strange)
    misshapen = fresh("misshapen")
    changed_state(misshapen, file, lambda state: state.update({key: state[key][:6]}))
    with pytest.raises(RewardCheckpointError, match="misshapen"):
        load_scorer(kind, misshapen)


def test_a_clip_folder_must_be_whole(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(folders["pickscore"], tmp_path / "pick"))
    state = load_file(folder / "model.safetensors")
    state.pop("text_projection.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardCheckpointError, match="missing: text_projection.weight"):
        load_scorer("pickscore", folder)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_with_more_than_tensors_is_refused(folders, tmp_path, capsys):
    folder = Path(shutil.copytree(folders["hpsv2"], tmp_path / "evil"))
    torch.save({"state_dict": {}, "more": Payload()}, folder / "HPS_v2.1_compressed.pt")
    with pytest.raises(RewardCheckpointError, match="no file of tensors only"):
        load_scorer("hpsv2", folder)
    assert "executed" not in capsys.readouterr().out


def test_a_head_of_other_width_or_that_does_not_chain_is_refused(folders, tmp_path):
    folder = Path(shutil.copytree(folders["aesthetic"], tmp_path / "wide"))
    tiny_scorers.save_laion_head(folder, tiny_scorers.laion_head(13))
    with pytest.raises(RewardCheckpointError, match="13 numbers.*gives 12"):
        load_scorer("aesthetic", folder)
    changed_state(folder, "sac+logos+ava1-l14-linearMSE.pth", lambda state: [state.pop(key) for key in list(state) if ".4." in key])
    with pytest.raises(RewardCheckpointError, match="layer 6 does not follow"):
        load_scorer("aesthetic", folder)


def test_an_unknown_kind_and_an_absent_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match="no scorer of kind 'clap': the kinds are reward, clip"):
        load_scorer("clap", tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        load_scorer("clip", tmp_path / "nowhere")


def test_the_scorer_id_names_weights_and_dtype(folders, tmp_path, scorers):
    folder = Path(shutil.copytree(folders["hpsv2"], tmp_path / "copy"))
    assert load_scorer("hpsv2", folder).scorer_id == scorers["hpsv2"].scorer_id
    assert load_scorer("hpsv2", folder, dtype=torch.bfloat16).scorer_id != scorers["hpsv2"].scorer_id
    changed_state(folder, "HPS_v2.1_compressed.pt", lambda state: state["logit_scale"].add_(1))
    assert load_scorer("hpsv2", folder).scorer_id != scorers["hpsv2"].scorer_id


@pytest.mark.parametrize("kind", FURTHER)
def test_half_precision_stays_near(folders, scorers, kind):
    exact = scorers[kind].score(PICTURES, PROMPTS).mu
    half = load_scorer(kind, folders[kind], dtype=torch.bfloat16).score(PICTURES, PROMPTS).mu
    assert np.abs(half - exact).max() < 0.1 * max(1.0, np.abs(exact).max())
