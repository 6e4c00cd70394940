"""A reward model spread over the processes that train together (FSDP2): each holds its share of every layer.
A 7 B model in each GPU would leave little room for the rollouts whose images it scores."""

from __future__ import annotations

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from dreamlite_data.rewards import RewardModel
from trainers.distributed import world


def shard_reward(reward: RewardModel, batch: int) -> None:
    """Shard the backbone of `reward` in place, layer by layer; the small float32 heads stay whole in every process.

    Every process must then score equally often, for a layer is gathered from all of them: raises ValueError where `batch` rows
    cannot be shared evenly, or where this process is alone.
    """
    here = world()
    if here.size < 2:
        raise ValueError("shard_rewards spreads the reward models over several processes, this one is alone: use runner torchrun or ray")
    if batch % here.size:
        raise ValueError(f"with shard_rewards every process must score equally many rows: make batch ({batch}) a multiple of {here.size}")
    network = reward.network
    mesh = init_device_mesh(network.device.type, (here.size,))
    for layer in [*network.backbone.visual.blocks, *network.backbone.language_model.layers]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=set(network.heads.parameters()))
    register_fsdp_forward_method(network, "image_features")  # the vision tower is called through it, before `forward`
