"""As a program: computes the same on the CPU and on the pretended device, and says in results.json where they differ.
A process of its own, for a device cannot be taken back from torch, and a library that sees one may use it."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dreamlite_data.lake import Lake
from dreamlite_data.rewards import load_reward, load_scorer
from tests.trainers import pretended_device
from tests.trainers.conftest import TINY_MODEL
from tests.trainers.synthetic import SceneRows
from trainers import flow, launch, parallel
from trainers.components.build import PACKAGED
from trainers.conditioning import PromptEncoder
from trainers.device import CPU
from trainers.evaluate import evaluate_images, velocity_loss
from trainers.execution import TrainExecution
from trainers.inference import Sampler
from trainers.loop import run
from trainers.lora import add_lora
from trainers.model import build_unet, load_vae
from trainers.recipes import supervised
from trainers.recipes.dmd2 import DMD2Recipe
from trainers.recipes.refl import ReFLRecipe
from trainers.recipes.supervised import SupervisedRecipe
from trainers.settings import DMD2Settings, EvaluateSettings, LoraSettings, ReFLSettings, SupervisedSettings

GPU = pretended_device.DEVICE
BOTH = {"generate": 0.5, "edit": 0.5}
JOINT = SupervisedSettings(tasks=BOTH, datasets=("t2i", "edit"), steps=4, batch=4, micro_batch=2, warmup_steps=1)
REFL = ReFLSettings(
    steps=2, batch=2, micro_batch=2, rollout_steps=2, sigma_high=1.0, image_guidance_scale=1.5, norm_guard_weight=0.1, second_every=1,
)  # fmt: skip
DMD2 = DMD2Settings(
    steps=2, batch=4, micro_batch=2, student_steps=2, fake_steps=1, fake_warmup_steps=0, gan_weight=0.1, image_guidance_scale=1.5
)
JUDGED = EvaluateSettings(prompts=2, steps=2, image_guidance_scale=1.5, velocity_rows=4)
RATES = ("samples_per_s", "data_wait_share", "tflops_per_s")


class Cases:
    """What is computed on each device; every method takes one and returns values to compare."""

    def __init__(self, components: Path, lake: Path, folder: Path) -> None:
        self.components, self.lake, self.folder = components, lake, folder
        self.rows = SceneRows(4, load_vae(components), PromptEncoder.load(components, "post_norm"))

    def unet(self, device: torch.device, seed: int = 0) -> Any:
        return build_unet(TINY_MODEL, 64, 8, seed).to(device)

    def sampler(self, device: torch.device) -> Sampler:
        return Sampler(self.unet(device).eval(), load_vae(self.components).to(device), PromptEncoder.load(self.components, "post_norm").to(device), 64, None)

    def rewards(self, device: torch.device) -> dict[str, Any]:
        return {task: load_reward(PACKAGED / "rewards" / task, device) for task in BOTH}

    def adamw(self, device: torch.device, settings: SupervisedSettings = JOINT) -> Any:
        """Two steps, a checkpoint, and two more after it in a recipe that began with other weights."""
        output = self.folder / f"{settings.optimizer}_{device.type}"
        run(SupervisedRecipe(self.unet(device), self.rows, settings, (1,)), steps=2, output=output, label=settings.optimizer)
        resumed = SupervisedRecipe(self.unet(device, seed=9), self.rows, settings, (1,))
        metrics = run(resumed, steps=4, output=output, label=settings.optimizer)
        placed = {parameter.device for parameter in resumed.unet.parameters()} | {value.device for value in resumed.ema.weights.values()}
        state = resumed.optimizers["unet"].state_dict()["state"]
        placed |= {value.device for each in state.values() for name, value in each.items() if name != "step"}  # AdamW's counter is the CPU's
        assert placed == {device}, placed
        saved = torch.load(output / "state.pt", weights_only=True)  # a tensor of the device would not come back from here
        return resumed.unet.state_dict(), saved, {name: value for name, value in metrics.items() if name not in RATES}

    def muon(self, device: torch.device) -> Any:
        return self.adamw(device, JOINT.model_copy(update={"optimizer": "muon", "min_snr_gamma": 5.0}))[0]

    def adapter(self, device: torch.device) -> Any:
        unet = build_unet(TINY_MODEL, 64, 8)
        add_lora(unet, LoraSettings(rank=2), 0)
        recipe = SupervisedRecipe(unet.to(device), self.rows, JOINT, (1,))
        return recipe.step(0), recipe.unet.state_dict()

    def refl(self, device: torch.device) -> Any:
        """A step of each task, each compared with the start model by a second scorer."""
        second = {task: load_scorer("reward", PACKAGED / "rewards" / task, device) for task in BOTH}
        recipe = ReFLRecipe(self.unet(device), load_vae(self.components).to(device), self.rewards(device), self.rows, REFL, (0, 4), second)
        return recipe.baseline, recipe.step(0), recipe.step(1), recipe.unet.state_dict(), recipe.watch.state_dict()

    def dmd2(self, device: torch.device) -> Any:
        """A step with the discriminator, and three branches of guidance."""
        recipe = DMD2Recipe(self.unet(device), self.rows, DMD2, (0, 5))
        return recipe.step(0), [module.state_dict() for module in recipe.modules.values()], recipe.ema.weights

    def two_branches(self, device: torch.device) -> Any:
        return self.sampler(device).generate(["a red circle", "a blue square"], [1, 2], steps=2, guidance_scale=2.0)

    def three_branches(self, device: torch.device) -> Any:
        images = self.rows_images()
        return self.sampler(device).edit(images, ["make it green"] * 2, [1, 2], steps=2, guidance_scale=2.0, image_guidance_scale=1.5)

    def rows_images(self) -> list[Any]:
        from PIL import Image

        return [Image.fromarray(np.full((64, 64, 3), shade, np.uint8)) for shade in (60, 200)]

    def evaluation(self, device: torch.device) -> Any:
        sampler = self.sampler(device)
        found = evaluate_images(sampler, self.rewards(device), JUDGED, self.folder / f"judged_{device.type}")
        return found.scores, velocity_loss(sampler, self.rows, JUDGED)

    def stage(self, device: torch.device) -> Any:
        """From a lake to a checkpoint and to a picture drawn with it, as a flow calls it."""
        output = self.folder / f"stage_{device.type}"
        settings = SupervisedSettings(tasks={"generate": 1.0}, datasets=("t2i",), steps=2, batch=4, micro_batch=2, warmup_steps=0)
        request = launch.StageRequest(
            stage="t2i", settings=settings, model=TINY_MODEL, components=self.components, parent=None, lake=self.lake,
            datasets={"t2i": 1}, output=output, seed=3, threads=1, execution=TrainExecution(),
        )  # fmt: skip
        launch.use_device = lambda wanted: device
        with Lake(self.lake, read_only=True) as lake:
            launch.train(request, lake)
        sampler = Sampler.load(output / "checkpoint", device)
        return sampler.unet.state_dict(), sampler.generate(["a red circle"], [1], steps=2, guidance_scale=2.0)

    def reads_in_a_step(self, micro_batch: int) -> list[str]:
        """What a step of the supervised recipe reads from the device."""
        recipe = SupervisedRecipe(self.unet(GPU), self.rows, JOINT.model_copy(update={"micro_batch": micro_batch}), (1,))
        before = len(pretended_device.reads)
        recipe.step(0)
        return pretended_device.reads[before:]

    def noise_left_behind(self) -> None:
        """The negative control: as it was before noise was moved."""
        moved, supervised.keyed_normal = supervised.keyed_normal, lambda key, rows, shape, device: flow.keyed_normal(key, rows, shape)
        try:
            SupervisedRecipe(self.unet(GPU), self.rows, JOINT, (1,)).step(0)
        finally:
            supervised.keyed_normal = moved


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Named tensors, arrays and plain values in nested containers, tensors on the CPU."""
    if isinstance(value, dict):
        return {inner: leaf for key, each in value.items() for inner, leaf in leaves(each, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {inner: leaf for key, each in enumerate(value) for inner, leaf in leaves(each, f"{name}/{key}").items()}
    return {name: value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value}


def difference(left: Any, right: Any) -> float:
    """The largest difference of two leaves: 0 for what is equal, NaN included, infinite for what cannot be compared."""
    left, right = np.asarray(left), np.asarray(right)
    if left.dtype.kind not in "fiub" or left.shape != right.shape:
        return 0.0 if np.array_equal(left, right) else float("inf")
    left, right = left.astype(np.float64), right.astype(np.float64)
    apart = np.where(np.isnan(left) & np.isnan(right), 0.0, np.abs(left - right))
    return float(np.nan_to_num(apart, nan=np.inf).max(initial=0.0))


def compared(case: Callable[[torch.device], Any]) -> dict[str, Any]:
    """How many values a case gives, and the largest difference between both devices with the name of the value."""
    here, there = leaves(case(CPU)), leaves(case(GPU))
    apart = {name: difference(here[name], there[name]) for name in here.keys() & there.keys()}
    furthest = max(apart, key=apart.__getitem__)
    return {"values": len(here), "alike": here.keys() == there.keys(), "largest": apart[furthest], "at": furthest}


def said(case: Callable[[], Any]) -> str:
    """The error of a case, with where it happened."""
    try:
        case()
    except Exception:  # noqa: BLE001
        return traceback.format_exc()
    return ""


def main(components: Path, lake: Path, folder: Path, names: tuple[str, ...]) -> None:
    """The named `Cases`, one after the other: one that fails does not end the others."""
    parallel.use_threads(1)
    torch.nn.functional.silu = lambda x, inplace=False: x * torch.sigmoid(x)  # the same backward pass on both, see `PretendedTensor`
    cases, results = Cases(components, lake, folder), {}
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention has no counterpart on a further device
        for name in names:
            try:
                results[name] = compared(getattr(cases, name))
            except Exception:  # noqa: BLE001
                results[name] = {"error": traceback.format_exc()}
            print(name, results[name], flush=True)
        results["reads"] = {str(size): cases.reads_in_a_step(size) for size in (1, 4)}
        results["noise_left_behind"] = said(cases.noise_left_behind)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), tuple(sys.argv[4:]))
