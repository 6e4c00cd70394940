"""Settings of the model, the six recipes and their evaluation, with the defaults of the small world.
An unknown key is an error; whatever can change a weight lives here, whatever cannot lives in `Execution`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from dreamlite_data.strict_settings import StrictSettings
from trainers.export.settings import ExportSettings

__all__ = [
    "ComponentsSettings",
    "DMD2Settings",
    "EvaluateSettings",
    "ExportSettings",
    "LoraSettings",
    "ModelSettings",
    "ReFLSettings",
    "StartSettings",
    "SupervisedSettings",
    "TrainSettings",
]


OptimizerName = Literal["adamw", "muon"]
Precision = Literal["float32", "bfloat16"]


class ComponentsSettings(StrictSettings):
    """Where the frozen parts (VAE, text encoder, rewards) come from."""

    source: str = Field(
        "packaged",
        description="`packaged` (trained by this project, kept in the package), `train` (train them now) or the path of a"
        " folder with vae/, text_encoder/, tokenizer/, processor/, scheduler/, rewards/generate and rewards/edit",
    )
    vae_steps: int = Field(18_000, gt=0, description="steps of the VAE when source is `train`")
    text_encoder_steps: int = Field(2_200, gt=0, description="steps of the text encoder when source is `train`")
    captioner_steps: int = Field(2_500, gt=0, description="steps of the captioner when source is `train`")
    reward_steps: int = Field(2_600, gt=0, description="steps of each reward model when source is `train`")
    seed: int = 0


class ModelSettings(StrictSettings):
    """The UNet, always built from this explicit configuration (the class defaults are another network)."""

    preset: Literal["small", "official"] = "small"
    hidden_state: Literal["pre_norm", "post_norm"] = "post_norm"
    size_px: int = Field(64, gt=0, multiple_of=8, description="side of the square panel")
    channels: tuple[int, ...] = Field((64, 96), min_length=2, description="width of each level of the small UNet")
    attention_at_full_resolution: bool = Field(True, description="false: blocks of the official pattern, for larger latents")
    layers: int = Field(1, gt=0, description="resnet and attention layers of each down block")
    head_width: int = 32
    aspect_buckets: bool = Field(
        False, description="train on panels of about size_px x size_px pixels in the shape nearest to each image; false: squares"
    )


class SizePhase(StrictSettings):
    """A part of a stage that trains at a size of its own."""

    size_px: int = Field(gt=0, multiple_of=8, description="side of the square panel")
    steps: int = Field(gt=0)
    logical_size_px: int | None = Field(None, gt=0, description="size that time_ids tell the network; null: size_px")
    micro_batch: int | None = Field(None, gt=0, description="null: that of the stage; small panels leave room for more rows")


class LoraSettings(StrictSettings):
    """A low-rank adapter that a stage trains instead of the whole network. There is no drop-out inside it: every draw of a
    training is keyed by its sample, so that a resumed run repeats it, and a mask drawn inside the layers would not be."""

    rank: int = Field(16, gt=0)
    alpha: float | None = Field(None, gt=0, description="the product of both factors is multiplied with alpha / rank; null: with 1")
    target_modules: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), min_length=1, description="last parts of the names of the layers that get an adapter"
    )


class StartSettings(StrictSettings):
    """A checkpoint that this run did not train, to start the first stage from: a folder in diffusers layout, or a hub id
    `org/name@revision`. Its text encoder, VAE and scheduler come with it; its weights are read as safetensors only."""

    checkpoint: str = Field(min_length=1)
    hidden_state: Literal["pre_norm", "post_norm"] | None = Field(
        None, description="what its UNet was trained on; null: what it says itself, else pre_norm, as the released weights"
    )
    size_px: int | None = Field(None, gt=0, multiple_of=8, description="side to train at; null: the checkpoint's own")
    licence: str | None = Field(None, description="of its weights, where its model card names none; null: that of the release")


class RecipeSettings(StrictSettings):
    """What every recipe can be asked for, and what it asks of its rows: by itself prompts and sources alone."""

    ema_width: float | None = Field(
        None, gt=0, lt=0.28, description="relative width of a power-law average (EDM2), such as 0.1; null: constant ema_decay"
    )
    precision: Precision = Field(
        "float32", description="arithmetic of the networks; trained weights, averages and losses are float32 in either, the reward models' are of it"
    )

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Columns that rows of a task must have a value in beyond those of every recipe."""
        return {}

    @property
    def reads_targets(self) -> bool:
        """Whether the target images are encoded."""
        return False


class SupervisedSettings(RecipeSettings):
    """One supervised stage: t2i, edit, joint or sft."""

    tasks: dict[Literal["generate", "edit"], float] = Field(description="share of each task in every batch")
    datasets: tuple[str, ...] = Field(description="names of the dataset versions it reads")
    steps: int = Field(gt=0)
    batch: int = Field(32, gt=0)
    micro_batch: int = Field(8, gt=0, description="rows of a batch whose graph is held at once; on CPUs, one thread's share")
    optimizer: OptimizerName = Field("adamw", description="muon is what `mini` is tuned with; adamw is what published recipes use")
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    final_learning_rate_share: float = Field(0.1, ge=0, le=1, description="cosine decay ends at this share of the rate")
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.995, ge=0, lt=1)
    timestep_law: Literal["uniform", "logit_normal"] = "uniform"
    timestep_shift: float = Field(1.0, gt=0, description="t' = a t / (1 + (a - 1) t); above 1 favours noise")
    stratified_times: bool = Field(True, description="spread the times of a batch evenly, which is unbiased; false: draw each alone")
    min_snr_gamma: float | None = Field(None, gt=0, description="weight the data loss by min(SNR, gamma), 5 in the paper; null: weight 1")
    drop_text: float = Field(0.10, ge=0, lt=1, description="share of generate rows whose prompt is dropped")
    drop_text_edit: float = Field(0.05, ge=0, lt=1, description="share of edit rows that lose only the instruction")
    drop_both_edit: float = Field(0.05, ge=0, lt=1, description="share of edit rows that lose instruction and source")
    foreground_weight: bool = Field(True, description="weight log2(total / edited area) + 1 on the edited latents")
    foreground_weight_cap: float = Field(5.0, ge=1)
    lora: LoraSettings | None = Field(None, description="train an adapter of these settings; null: the whole network")
    size_phases: tuple[SizePhase, ...] = Field((), description="sizes in their order, the model's size_px last; none: that alone")

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Columns that rows of a task must have a value in, beyond those of every recipe."""
        return {"edit": ("edit_mask",)} if self.foreground_weight else {}

    @property
    def reads_targets(self) -> bool:
        """Whether the target images are encoded."""
        return True

    @model_validator(mode="after")
    def _phases_make_up_the_stage(self) -> SupervisedSettings:
        steps = sum(phase.steps for phase in self.size_phases)
        if self.size_phases and steps != self.steps:
            raise ValueError(f"the steps of `size_phases` must sum to `steps` = {self.steps}, not {steps}")
        return self

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> SupervisedSettings:
        if abs(sum(self.tasks.values()) - 1) > 1e-6:
            raise ValueError(f"the shares in `tasks` must sum to 1, not {sum(self.tasks.values()):g}")
        return self


class SecondScorerSettings(StrictSettings):
    """A scorer beside the reward that ReFL follows: `model` is a local folder; 'reward' is another model of the reward's class."""

    kind: Literal["reward", "clip", "pickscore", "hpsv2", "imagereward", "aesthetic"]
    model: Path


class ReFLSettings(RecipeSettings):
    """Reward feedback learning: the reward's gradient through the decoder into one denoising step."""

    datasets: tuple[str, ...] = ("rl",)
    steps: int = Field(gt=0)
    batch: int = Field(16, gt=0)
    micro_batch: int = Field(8, gt=0)
    rollout_steps: int = Field(8, gt=1, description="deployed Euler steps of the guided rollout")
    sigma_low: float = Field(0.05, ge=0, description="the gradient step is drawn among steps with sigma in this range")
    sigma_high: float = Field(0.6, le=1)
    hinge: Literal["cap", "above", "none"] = Field("cap", description="cap: max(0, b - r); above: -max(0, r - b)")
    hinge_margin: float = Field(1.5, description="b, in standard deviations above the start model's mean reward")
    reward_weight: float = Field(0.02, ge=0)
    velocity_weight: float = Field(1.0, ge=0, description="MSE to the frozen start model's velocity")
    norm_guard_weight: float = Field(0.0, ge=0, description="penalty on a velocity norm above the start model's (NormGuard); 0: none")
    second_scorers: dict[Literal["generate", "edit"], SecondScorerSettings] = Field(
        {}, description="scorers that training does not follow, by task; training stops where one falls while the reward rises"
    )
    second_every: int = Field(5, gt=0, description="steps of a task between two comparisons with the start model")
    second_window: int = Field(4, gt=0, description="comparisons whose mean decides")
    second_drop: float = Field(0.5, gt=0, description="fall of the second scorer that stops, in the start model's standard deviations")
    learning_rate: float = Field(1e-4, gt=0)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.95, ge=0, lt=1)
    guidance_scale: float = 2.0
    image_guidance_scale: float = 1.0
    lora: LoraSettings | None = Field(None, description="train an adapter; the start model is then the same network without it")

    @model_validator(mode="after")
    def _gains_have_a_spread(self) -> ReFLSettings:
        if self.second_scorers and self.batch < 2:
            raise ValueError("second_scorers measure in standard deviations of a batch, and `batch` is 1: make it 2 or more")
        return self


class DMD2Settings(RecipeSettings):
    """Distribution matching distillation of the guided model into few deployed steps without guidance."""

    datasets: tuple[str, ...] = ("t2i", "edit")
    steps: int = Field(gt=0, description="student steps")
    batch: int = Field(32, gt=0)
    micro_batch: int = Field(8, gt=0)
    student_steps: int = Field(4, gt=0, description="steps of the deployed sampler")
    fake_steps: int = Field(3, gt=0, description="steps of the fake score for each step of the student")
    fake_warmup_steps: int = Field(30, ge=0)
    learning_rate: float = Field(2e-4, gt=0)
    fake_learning_rate: float = Field(4e-4, gt=0)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.95, ge=0, lt=1)
    guidance_scale: float = 2.0
    image_guidance_scale: float = 1.0
    score_time_low: float = Field(0.02, ge=0)
    score_time_high: float = Field(0.98, le=1)
    lora: LoraSettings | None = Field(None, description="student and fake score are each an adapter on the teacher")
    score_time_shift: float = Field(1.0, gt=0, description="static shift of the score times before they are clamped to both bounds")
    gan_weight: float = Field(0.0, ge=0, description="weight of the student's adversarial loss, 5e-3 in the paper; 0: no discriminator")
    gan_fake_weight: float = Field(1e-2, gt=0, description="weight of the discriminator's loss beside that of the fake score")
    gan_time_high: float = Field(1.0, gt=0, le=1, description="the discriminator sees rows noised to times below this")

    @property
    def reads_targets(self) -> bool:
        """Whether the target images are encoded: they are the discriminator's real rows."""
        return self.gan_weight > 0


class TrainSettings(StrictSettings):
    """The six recipes in their order. A stage that is null is left out: the next one starts from the last that was trained."""

    t2i: SupervisedSettings | None
    edit: SupervisedSettings | None
    joint: SupervisedSettings | None
    sft: SupervisedSettings | None
    refl: ReFLSettings | None
    dmd2: DMD2Settings | None


class EvaluateSettings(StrictSettings):
    """How a checkpoint is judged: by the scene verifier, the rewards and the held-out velocity loss."""

    prompts: int = Field(192, gt=0, description="held-out prompts, and as many held-out edits")
    seeds: int = Field(1, gt=0, description="pictures drawn of each of them, each from noise of its own")
    steps: int = Field(10, gt=0, description="sampling steps (the distilled student always takes its own four)")
    guidance_scale: float = 2.0
    image_guidance_scale: float = 1.0
    velocity_rows: int = Field(256, gt=0)
    split: str | None = Field(None, description="split of the datasets to judge on; null: validation, or the first beside train")
    seed: int = 20_260_328
