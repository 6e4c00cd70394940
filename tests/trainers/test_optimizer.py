"""The optimizer: matrices move as torch's Muon moves them, the rest as AdamW does, and a resumed run does not differ."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trainers.optimizer import Muon, hidden_matrices, orthogonalised


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 16)
        self.first = nn.Conv2d(3, 16, 3)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.hidden = nn.Conv2d(16, 24, 3)
        self.linear = nn.Linear(24, 48, bias=False)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_only_hidden_matrices_and_kernels_are_orthogonalised() -> None:
    net = Net()
    assert {id(each) for each in hidden_matrices(net)} == {id(net.hidden.weight), id(net.linear.weight)}


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32)])
def test_orthogonalised_flattens_the_spectrum_and_keeps_the_directions(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape) * torch.logspace(0, -2, shape[1])
    result = orthogonalised(matrix)
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.3 and values.median() > 0.6
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert (left.T @ result @ right.T).diag()[0] > 0.6  # the leading direction keeps its sign
    assert torch.linalg.svdvals(matrix / matrix.norm()).median() < 0.2  # what it flattened was not flat


def test_a_matrix_moves_as_under_the_muon_of_torch() -> None:
    ours, theirs = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
    theirs.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    train(ours, Muon(ours, learning_rate=0.01, weight_decay=0.1), range(5))
    train(theirs, torch.optim.Muon(theirs.parameters(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), range(5))
    difference = (ours.weight - theirs.weight).norm() / (theirs.weight - start).norm()
    assert difference < 0.02  # torch orthogonalises in bfloat16


def test_the_rest_moves_as_under_adamw() -> None:
    ours, theirs = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
    theirs.load_state_dict(ours.state_dict())
    train(ours, Muon(ours, learning_rate=0.01, betas=(0.9, 0.99), weight_decay=0.1), range(7))
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.0), range(7))
    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.bias, theirs.bias, atol=1e-6, rtol=1e-5)


def test_resumed_training_is_bit_equal() -> None:
    whole, cut = Net(), Net()
    train(whole, Muon(whole, learning_rate=0.01), range(6))
    first = Muon(cut, learning_rate=0.01)
    train(cut, first, range(3))
    resumed = Muon(cut, learning_rate=0.01)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    train(cut, resumed, range(3, 6))
    forgotten = Net()
    train(forgotten, Muon(forgotten, learning_rate=0.01), range(3))
    train(forgotten, Muon(forgotten, learning_rate=0.01), range(3, 6))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, cut.state_dict()[name]), name
    assert not torch.equal(whole.linear.weight, forgotten.linear.weight)  # without its state the run would differ


def test_shared_parameters_are_updated_once() -> None:
    net = nn.Linear(16, 16, bias=False)
    twin = nn.Linear(16, 16, bias=False)
    twin.weight = net.weight
    assert sum(len(group["params"]) for group in Muon(net, twin, learning_rate=0.1).param_groups) == 1
