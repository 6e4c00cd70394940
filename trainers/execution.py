"""Where a training runs: in this process, in several that torchrun starts, or on Ray Train.
None of it changes a result by more than the rounding of a sum, so none of it is in a step's key."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dreamlite_data.strict_settings import StrictSettings

Device = Literal["auto", "cpu", "cuda"]
"""What a process computes on; auto takes a GPU where torch sees one. `trainers.device` says which."""


class TrainExecution(StrictSettings):
    """How the training steps run. Each process takes its share of every global batch, whose size stays that of the recipe."""

    runner: Literal["plain", "torchrun", "ray"] = Field(
        "plain", description="plain: this process. torchrun: `workers` processes on this machine. ray: Ray Train, here or at RAY_ADDRESS"
    )
    workers: int | tuple[int, int] = Field(1, description="processes; [least, most] lets Ray start with what there is room for")
    cpus_per_worker: float = Field(1.0, gt=0, description="logical CPUs that Ray sets aside for each worker")
    gpus_per_worker: int = Field(0, ge=0, le=1, description="GPUs that Ray sets aside for each worker, which drives one; 0 trains on CPUs there")
    max_failures: int = Field(3, ge=0, description="how often lost workers are replaced; each time training goes on from its checkpoint")
    start_timeout_s: int = Field(300, gt=0, description="how long Ray waits for the workers to be up")
    checkpoint_every_s: float = Field(30.0, ge=0, description="what a kill may cost; large checkpoints are written less often")
    gradient_checkpointing: bool = Field(False, description="compute activations again in the backward pass: less memory, a third more work")
    shard_rewards: bool = Field(False, description="spread the reward models over the workers (FSDP2) instead of one copy in each")

    @property
    def least(self) -> int:
        """The fewest workers it may run with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """The most workers it may run with."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _fits_together(self) -> TrainExecution:
        if self.least < 1 or self.most < self.least:
            raise ValueError(f"workers must be a number from 1 or [least, most], not {self.workers}")
        if not isinstance(self.workers, int) and self.runner != "ray":
            raise ValueError(f"workers [{self.least}, {self.most}] needs runner: ray, the only one that can start with fewer; here it is {self.runner}")
        if self.runner == "plain" and self.most > 1:
            raise ValueError(f"runner: plain is one process, workers is {self.most}: set runner to torchrun (this machine) or ray")
        if self.shard_rewards and self.least < 2:
            raise ValueError("shard_rewards spreads the reward models over two or more workers: raise workers or turn it off")
        return self
