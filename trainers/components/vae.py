"""Train the small world's VAE: an `AutoencoderTiny` with 4 latent channels at an eighth of the resolution (f8).
Noise on the latents during training makes the decoder forgive the small errors of a diffusion model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import nn
from torch.nn import functional as F

from dreamlite_data import scenes
from dreamlite_data.scenes.render import background, coverage
from trainers.components.classes import FIELDS, cell_classes
from trainers.loop import optimizer_step
from trainers.optimizer import Muon
from trainers.pixels import to_tensor, to_uint8

CHANNELS = 32
FACTOR = 8
BATCH = 24
PEAK_RATE = 4e-3
LATENT_NOISE = 0.25  # largest standard deviation of the noise on the latents, whose own is about 1
OBJECT_WEIGHT = 8.0
SHAPE_WEIGHT = 16.0
"""Pixels in which the four shapes differ (the corners of a square, the notches of a cross) weigh this much more: they are a
fifteenth of an image and all that tells a square from a circle."""
GAP_WEIGHT, GAP_REACH_PX = 16.0, 4.0
"""Pixels between two neighbours, within this reach of both, weigh this much more: blurred, two objects are read as one."""
CLASS_WEIGHT, CLASS_NOISE = 0.2, 1.0
READ_WEIGHT, READ_SHARPNESS = 0.3, 30.0
"""The decoded object is laid over each shape in each size, as the verifier reads it, and the true one must fit best."""
SMALL_SHARE = 0.5  # of the windows; a small square and a small circle differ in a dozen pixels and are told apart last
ENCODER_SHARE = 0.06  # first share of the steps, in which only the encoder learns, against the two short heads
CROP_PX = 32
"""The network is convolutional, so it learns on windows around objects: four times as many objects for the same work."""
CROP_SHIFT_PX = 8
WHOLE_SHARE, WHOLE_BATCH = 0.2, 8
"""Last share of the steps, which see whole scenes: the network reaches further than a window, and inside a scene it meets no border."""


def build_vae(
    *,
    steps: int,
    seed: int = 0,
    log: Callable[[int, dict[str, float]], None],
    start: AutoencoderTiny | None = None,
    peak_rate: float = PEAK_RATE,
) -> AutoencoderTiny:
    """Train on freshly drawn scenes, from `start` where given.

    f8, as released. An f4 VAE learns this world in a third of the steps, but leaves the diffusion model four times as many
    latents, and so fewer samples and less attention in the same minutes.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 1))
    model = (new_vae() if start is None else start.train()).to(memory_format=torch.channels_last)
    # Two throw-away heads with short paths to the encoder. The linear decoder teaches it colours long before the deep
    # decoder can; the classifier, which sees noise as strong as the code, makes it set shapes, sizes and colours apart.
    linear_decoder = nn.Sequential(nn.Conv2d(4, 12, 3, padding=1), nn.PixelShuffle(2))
    classes = [len(values) for values in FIELDS.values()]
    classifier = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, sum(classes), 1))
    modules = (model, linear_decoder, classifier)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = Muon(*modules, learning_rate=peak_rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        done = step / steps
        windows = draw_windows(rng) if done < 1 - WHOLE_SHARE else draw_windows(rng, WHOLE_BATCH, scenes.CANVAS_PX)
        images, weight = windows.images, windows.weight
        latents = model.encoder(images)
        loss_pixel = loss_edge = loss_read = torch.zeros(())
        if done >= ENCODER_SHARE or start is not None:
            decoded = model.decoder(with_noise(latents, LATENT_NOISE, generator))
            error = decoded - images
            loss_read = reading_loss(decoded, windows)
            loss_pixel = (weight * (error.abs() + 2 * error**2)).mean()
            loss_edge = sum((weight.narrow(axis, 0, error.shape[axis] - 1) * error.diff(dim=axis).abs()).mean() for axis in (2, 3))
        logits = classifier(with_noise(latents, CLASS_NOISE, generator)).split(classes, 1)
        loss_class = sum(F.cross_entropy(part, windows.classes[:, field]) for field, part in enumerate(logits))
        # White latents: zero mean, unit spread, no channel a copy of another. It is the scale that flow matching's
        # unit noise expects, and it keeps the code from collapsing to brightness.
        flat = latents.transpose(0, 1).flatten(1)
        loss_latent = ((torch.cov(flat) - torch.eye(len(flat))) ** 2).mean() + (flat.mean(1) ** 2).mean()
        small, small_weight = F.avg_pool2d(images, FACTOR // 2), F.avg_pool2d(weight, FACTOR // 2)
        loss_linear = (small_weight * (linear_decoder(latents) - small) ** 2).mean()
        loss = loss_pixel + loss_edge + 0.5 * loss_latent + (1.0 if done < 0.3 and start is None else 0.2) * loss_linear
        loss = loss + CLASS_WEIGHT * loss_class + READ_WEIGHT * loss_read
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer_step(optimizer, parameters, 1.0, peak_rate * min(1.0, done / 0.02 + 0.01) * max(0.01, 1 - done))
        if (step + 1) % 100 == 0 or step + 1 == steps:
            values = {"loss": loss, "pixel": loss_pixel, "edge": loss_edge, "linear": loss_linear, "latent": loss_latent}
            values |= {"class": loss_class, "read": loss_read}
            log(step + 1, {name: float(value.detach()) for name, value in values.items()})
    return model.eval()


def with_noise(latents: torch.Tensor, largest: float, generator: torch.Generator) -> torch.Tensor:
    """Latents [N, 4, H, W] plus normal noise whose deviation is drawn for each row, uniform up to `largest`."""
    level = largest * torch.rand((len(latents), 1, 1, 1), generator=generator)
    return latents + level * torch.randn(latents.shape, generator=generator)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows around one object each: images [N, 3, CROP, CROP] in [-1, 1], weights [N, 1, CROP, CROP], classes of each
    latent cell [N, fields, CROP / 8, CROP / 8]; and how the object is read: the empty background [N, 3, CROP, CROP], the object's
    colour [N, 3, 1, 1], every shape in every size where it stands [N, shapes * sizes, CROP, CROP] and which of them it is [N]."""

    images: torch.Tensor
    weight: torch.Tensor
    classes: torch.Tensor
    behind: torch.Tensor
    colour: torch.Tensor
    templates: torch.Tensor
    drawn: torch.Tensor


def draw_windows(rng: np.random.Generator, count: int = BATCH, crop_px: int = CROP_PX) -> Windows:
    """`count` windows around the objects of fresh scenes, `SMALL_SHARE` of them around small ones.

    Windows lie on the latent grid, where objects stand in a whole scene: other phases would be learned for nothing.
    """
    picked: list[tuple[scenes.Scene, scenes.SceneObject, int, int]] = []
    while len(picked) < count:
        scene = scenes.sample_scene(rng)
        for item in scene.objects:
            if (item.size == "small") != (rng.random() < SMALL_SHARE):
                continue
            shift = rng.integers(-CROP_SHIFT_PX, CROP_SHIFT_PX + 1, 2)
            corner = np.rint((np.asarray(item.centre_px()) - crop_px / 2 + shift) / FACTOR)
            left, top = np.clip(corner, 0, (scenes.CANVAS_PX - crop_px) // FACTOR).astype(int)
            picked.append((scene, item, left, top))
    picked = picked[:count]
    # Whole scenes once each, though several windows may show one: drawing them costs as much as the encoder.
    shown = {scene: number for number, scene in enumerate(dict.fromkeys(scene for scene, *_ in picked))}
    pixels = np.stack([scenes.render(scene) for scene in shown])
    empty = np.stack([background(scene.background, scene.style) for scene in shown])
    weight = object_weight(pixels, empty)
    weight += torch.stack([SHAPE_WEIGHT * shape_difference(scene) + GAP_WEIGHT * gaps(scene) for scene in shown])
    weight, classes = weight.numpy(), np.stack([cell_classes(scene, FACTOR) for scene in shown])

    rows: list[tuple[np.ndarray, ...]] = []
    for scene, item, left, top in picked:
        at = tuple(slice(start * FACTOR, start * FACTOR + crop_px) for start in (top, left))
        cells = tuple(slice(start, start + crop_px // FACTOR) for start in (top, left))
        index = shown[scene]
        drawn = np.asarray(TEMPLATES.index((item.shape, scenes.SIZES[item.size])))
        colour = np.asarray(scenes.COLOURS[item.colour]) * item.brightness
        rows.append((pixels[index][at], weight[index][:, *at], classes[index][:, *cells], empty[index][at], colour, drawn))
    images, weight, classes, behind, colour, drawn = map(np.stack, zip(*rows, strict=True))
    x, y = (_column([item.centre_px()[axis] - corner[axis] * FACTOR for _, item, *corner in picked]) for axis in (0, 1))
    templates = np.stack([coverage(shape, radius, x, y, crop_px) for shape, radius in TEMPLATES], 1)
    return Windows(
        to_tensor(images).contiguous(memory_format=torch.channels_last), torch.from_numpy(weight), torch.from_numpy(classes),
        to_tensor(behind), (torch.from_numpy(colour).float() / 127.5 - 1)[:, :, None, None], torch.from_numpy(templates),
        torch.from_numpy(drawn),
    )  # fmt: skip


def _column(values: list[float]) -> np.ndarray:
    """One value a row, float32 [rows, 1, 1], as `coverage` takes them beside pixels."""
    return np.asarray(values, dtype=np.float32)[:, None, None]


TEMPLATES = [(shape, radius) for shape in scenes.SHAPES for radius in scenes.SIZES.values()]


def reading_loss(decoded: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Cross-entropy of the true shape and size against the others, by how well each covers what is seen of the object: the
    verifier's overlap (intersection over union of coverage), at the true centre and colour."""
    line = windows.colour - windows.behind
    seen = ((decoded - windows.behind) * line).sum(1) / (line * line).sum(1).clamp(min=1e-3)
    near = F.max_pool2d(windows.templates.amax(1, keepdim=True), 5, stride=1, padding=2)[:, 0] > 0
    seen = (seen.clamp(0, 1) * near)[:, None]
    common = torch.minimum(seen, windows.templates).sum((2, 3))
    overlap = common / (seen.sum((2, 3)) + windows.templates.sum((2, 3)) - common)
    return F.cross_entropy(READ_SHARPNESS * overlap, windows.drawn)


def shape_difference(scene: scenes.Scene) -> torch.Tensor:
    """How much the four shapes differ in each pixel, were each of them drawn for each object: [1, 64, 64] in [0, 1]."""
    radius, x, y = _placed(scene)
    drawn = np.stack([coverage(shape, radius, x, y, scenes.CANVAS_PX) for shape in scenes.SHAPES])
    return torch.from_numpy((drawn.max(0) - drawn.min(0)).sum(0))[None]


def gaps(scene: scenes.Scene) -> torch.Tensor:
    """Pixels within `GAP_REACH_PX` of two objects and inside neither: [1, 64, 64] in [0, 1]."""
    radius, x, y = _placed(scene)
    near = coverage("square", radius / 0.88 + GAP_REACH_PX, x, y, scenes.CANVAS_PX).sum(0)
    inside = np.max([coverage(item.shape, scenes.SIZES[item.size], *item.centre_px(), scenes.CANVAS_PX) for item in scene.objects], 0)
    return torch.from_numpy((near - 1).clip(0, 1) * (1 - inside))[None]


def _placed(scene: scenes.Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Radius and centre (x, y) in px of each object, [objects, 1, 1]."""
    centres = [item.centre_px() for item in scene.objects]
    return _column([scenes.SIZES[item.size] for item in scene.objects]), _column([x for x, _ in centres]), _column([y for _, y in centres])


def new_vae() -> AutoencoderTiny:
    """The untrained model."""
    model = AutoencoderTiny(
        encoder_block_out_channels=(CHANNELS,) * 4,
        decoder_block_out_channels=(CHANNELS,) * 4,
        num_encoder_blocks=(0, 1, 2, 2),
        num_decoder_blocks=(3, 3, 2, 0),
        latent_channels=4,
        scaling_factor=1.0,
    )
    initialise(model)
    return model


def initialise(model: AutoencoderTiny) -> None:
    """He initialisation with quiet residual branches: the default one dims colours at each of some thirty layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("conv.4.weight"):  # last convolution of an AutoencoderTinyBlock
            parameter.data.mul_(0.1)


def object_weight(pixels: np.ndarray, empty: np.ndarray) -> torch.Tensor:
    """Weight [N, 1, H, W] of scenes and their empty backgrounds, both [N, H, W, 3]: objects and their surroundings count
    `OBJECT_WEIGHT` times.

    They cover a tenth of an image; unweighted, the codec learns backgrounds and forgets what stands on them.
    """
    changed = torch.from_numpy(np.abs(pixels - empty).max(-1) > 4).float().unsqueeze(1)
    return 1 + (OBJECT_WEIGHT - 1) * F.max_pool2d(changed, 5, stride=1, padding=2)


@torch.no_grad()
def measure_vae(model: AutoencoderTiny, *, seed: int, count: int = 2048) -> dict[str, float]:
    """Round trips of `count` held-out scenes. `scenes_read`: share that the verifier still reads exactly, `scenes_read_noisy` with
    noise of deviation 0.15 on the latents; mean absolute errors in 0..255; mean and spread of the latents."""
    rng = np.random.default_rng((seed, 2))
    generator = torch.Generator().manual_seed(seed)
    truth = [scenes.sample_scene(rng) for _ in range(count)]
    images = np.stack([scenes.render(scene) for scene in truth])
    latents = torch.cat([model.encoder(to_tensor(part)) for part in np.array_split(images, count // 64 or 1)])
    metrics = {"latent_mean": latents.mean().item(), "latent_std": latents.std().item()}
    for name, level in (("", 0.0), ("_noisy", 0.15)):
        noisy = latents + level * torch.randn(latents.shape, generator=generator)
        decoded = to_uint8(torch.cat([model.decoder(part) for part in noisy.split(64)]))
        right = sum(scenes.matches(image, scene) for image, scene in zip(decoded, truth, strict=True))
        metrics[f"scenes_read{name}"] = right / count
        metrics[f"mean_absolute_error{name}"] = float(np.abs(decoded.astype(int) - images).mean())
    return metrics
