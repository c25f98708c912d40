"""A transformer in two parts computes what the whole does: small towers with random weights."""

import pytest
import small_clip
import torch

from detector.finetuning import adapters
from detector.finetuning.tail import Tail

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tower():
    return small_clip.small_vit(None, resolution=32)


@pytest.fixture
def pixels():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def gradients(tower, features):
    tower.zero_grad()
    (features * torch.arange(features.numel()).reshape(features.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in tower.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "train, last, frozen", [("blocks:1", None, 1), ("blocks:2", None, 0), ("lora:4", 1, 1)]
)
def test_features_and_gradients_equal_those_of_the_whole_tower(
    train, last, frozen, checkpointing, tower, pixels
):
    adapters.choose_trained(tower, train, last)
    trained = adapters.Trained(tower).parameters
    with torch.no_grad():
        for name, parameter in trained.items():
            if "parametrizations" in name:  # new adapters change nothing
                parameter.normal_(0, 0.05)
    tail = Tail(tower, frozen, checkpointing)
    with torch.no_grad():
        tokens = tail.first(pixels)
    assert tokens.shape == (6, 5, 128)
    ours, theirs = tail(tokens), tower(pixels)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours, theirs = gradients(tower, ours), gradients(tower, theirs)
    assert ours.keys() == theirs.keys() == trained.keys()
    for name, gradient in theirs.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4 * size)


def test_an_adapters_frozen_weight_gets_no_gradient(tower, pixels):
    adapters.choose_trained(tower, "lora:4", 1)
    tail = Tail(tower, 1)
    features = tail(tail.first(pixels))
    visited, shapes = [features.grad_fn], []
    while visited:
        node = visited.pop()
        if hasattr(node, "variable"):
            shapes.append(tuple(node.variable.shape))
        visited += [parent for parent, _ in node.next_functions if parent is not None]
    assert shapes and all(4 in shape for shape in shapes)
