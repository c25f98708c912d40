"""Trained parts of a tower and their merge: small towers of both kinds, random weights."""

from unittest.mock import Mock

import numpy as np
import pytest
import small_clip
import torch

from detector.base.errors import UsageError
from detector.finetuning import adapters
from detector.finetuning.descent import clip_state_dict, descend

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = list(small_clip.SMALL)


@pytest.fixture(scope="module")
def images(photos):
    """32 different pictures: crops of photographs and their mirror images."""
    crops = small_clip.crops(photos)
    return crops + [image.transpose(0) for image in crops]


@pytest.fixture(scope="module")
def labels():
    """Random labels, which can only be memorised."""
    return torch.from_numpy(np.random.default_rng(0).permutation(32) % 2).float()


@pytest.fixture
def tower_of(images):
    """Function: 'vit' or 'resnet' -> (tower with fixed weights, pixels of the 32 pictures)."""

    def make(kind):
        tower = small_clip.SMALL[kind](images[:16], resolution={"vit": 32, "resnet": 64}[kind])
        return tower, torch.from_numpy(small_clip.pixels_of(images, tower.input_resolution))

    return make


def with_head(tower):
    torch.manual_seed(1)
    return torch.nn.Sequential(tower, torch.nn.Linear(tower.output_dim, 1)).eval()


def run(model, steps, make=torch.optim.AdamW, lr=1e-2, scaler=None, dtype=torch.float32):
    """Train for steps (lists of batches) -> (their losses, the optimiser).

    With a `scaler` every step of the schedule halves the learning rate.
    """
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5 if scaler else 1.0)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    losses = [descend(model, batches, optimizer, schedule, scaler, autocast) for batches in steps]
    return losses, optimizer


def choose(tower, train):
    """`train`: the value of --train, and of --last where it is given."""
    train, _, last = train.partition(" --last ")
    adapters.choose_trained(tower, train, int(last) if last else None)


def changed(before, tower):
    after = tower.state_dict()
    assert after.keys() == before.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def is_trained(name, kind, train):
    """Does `train` name this tensor of a small tower (2 blocks, 1-1-1-1 bottlenecks)?"""
    attention_or_mlp = (
        "in_proj_weight",
        "out_proj.weight",
        "c_fc.weight",
        "c_proj.weight",
        "k_proj.weight",
        "q_proj.weight",
        "v_proj.weight",
    )
    of = {
        ("vit", "blocks:1"): (
            name.startswith(("transformer.resblocks.1.", "ln_post.")) or name == "proj"
        ),
        ("resnet", "blocks:1"): (
            name.startswith(("layer4.", "attnpool."))
            and "running" not in name
            and "num_batches" not in name
        ),
        ("vit", "norms"): "ln_" in name,
        ("resnet", "norms"): (
            (".bn" in f".{name}" or "downsample.1" in name) and name.endswith(("weight", "bias"))
        ),
        ("vit", "lora:2"): name.endswith(attention_or_mlp),
        ("resnet", "lora:2"): name.endswith(attention_or_mlp),
        ("vit", "lora:2 --last 1"): (
            name.startswith("transformer.resblocks.1.") and name.endswith(attention_or_mlp)
        ),
        ("vit", "norms --last 1"): name.startswith("transformer.resblocks.1.ln_"),
    }
    return of[kind, train]


@pytest.mark.parametrize(
    "kind, train",
    [
        *((kind, train) for kind in KINDS for train in ("blocks:1", "norms", "lora:2")),
        ("vit", "lora:2 --last 1"),
        ("vit", "norms --last 1"),
    ],
)
def test_a_step_changes_the_named_parameters_and_no_other(kind, train, tower_of, labels):
    tower, pixels = tower_of(kind)
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    choose(tower, train)
    run(with_head(tower), [[(pixels[:8], labels[:8])]] * 2)
    adapters.merge(tower)
    named = {name for name in before if is_trained(name, kind, train)}
    # a key's bias shifts all scores of a query alike, so softmax gives it no gradient
    assert named and named - {"attnpool.k_proj.bias"} <= changed(before, tower) <= named


@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapters_give_the_same_features(kind, tower_of):
    tower, pixels = tower_of(kind)
    names = tower.state_dict().keys()
    with torch.no_grad():
        untouched = tower(pixels)
        adapters.choose_trained(tower, "lora:4")
        assert torch.equal(tower(pixels), untouched)  # new adapters change nothing
        for parameter in adapters.Trained(tower).parameters.values():
            parameter.normal_(0, 0.05)
        beside = tower(pixels)
        adapters.merge(tower)
        merged = tower(pixels)
    assert tower.state_dict().keys() == names
    assert (beside - untouched).abs().max() > 0.05 * untouched.abs().max()
    torch.testing.assert_close(merged, beside, rtol=1e-5, atol=1e-5 * float(beside.abs().max()))
    assert all(tensor.dtype != torch.float32 for tensor in clip_state_dict(tower).values())


@pytest.mark.parametrize(
    "kind, train",
    [
        ("vit", "blocks:2"),
        ("vit", "norms"),
        ("vit", "lora:2"),
        ("resnet", "blocks:2"),
        ("resnet", "norms"),
    ],
)
def test_checkpointing_runs_the_blocks_twice_and_gives_the_same_gradients(
    kind, train, tower_of, labels
):
    gradients, passes = [], []
    for checkpointing in (False, True):
        tower, pixels = tower_of(kind)
        adapters.choose_trained(tower, train)
        model, forward = with_head(tower), Mock(return_value=None)
        inside = tower.transformer.resblocks[-1].ln_1 if kind == "vit" else tower.layer4[-1].conv1
        inside.register_forward_pre_hook(forward)
        if checkpointing:
            adapters.checkpoint_blocks(tower)
        run(model, [[(pixels[:8], labels[:8])]], torch.optim.SGD)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients.append([p.grad.clone() for p in trained])
        passes.append(forward.call_count)
    assert passes == [1, 2] and len(gradients[0]) > 2
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


def test_two_batches_of_eight_equal_a_batch_of_sixteen(tower_of, labels):
    weights, losses = [], []
    for parts in (1, 2):
        tower, pixels = tower_of("vit")
        adapters.choose_trained(tower, "blocks:2")
        model = with_head(tower)
        batches = list(zip(pixels[:16].chunk(parts), labels[:16].chunk(parts), strict=True))
        assert [len(part) for part, _ in batches] == [16 // parts] * parts
        losses.append(run(model, [batches] * 3, torch.optim.SGD)[0])
        weights.append(adapters.Trained(model).state_dict())
    assert losses[0][0] > losses[0][-1] and losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("train, lr", [("blocks:2", 1e-3), ("norms", 1e-2), ("lora:8", 5e-3)])
def test_32_images_with_random_labels_are_memorised(train, lr, tower_of, labels):
    tower, pixels = tower_of("vit")
    adapters.choose_trained(tower, train)
    model = with_head(tower)
    losses, _ = run(model, [[(pixels, labels)]] * 60, lr=lr)
    with torch.inference_mode():
        right = (model(pixels)[:, 0] > 0) == labels.bool()
    # smoothed labels allow no loss below 0.117
    assert losses[0] > 0.6 and losses[-1] < 0.2 and right.all()


def test_a_float16_step_with_overflowing_gradients_is_skipped(tower_of, labels):
    tower, pixels = tower_of("vit")
    adapters.choose_trained(tower, "lora:4")
    model = with_head(tower)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-50)
    before = adapters.Trained(model).state_dict()
    _, optimizer = run(model, [[(pixels, labels)]], scaler=scaler, dtype=torch.float16)
    assert scaler.get_scale() == 2.0**10 and optimizer.param_groups[0]["lr"] == 1e-2
    torch.testing.assert_close(adapters.Trained(model).state_dict(), before, rtol=0, atol=0)
    losses, optimizer = run(model, [[(pixels, labels)]] * 2, scaler=scaler, dtype=torch.float16)
    assert losses[1] < losses[0] and optimizer.param_groups[0]["lr"] == 2.5e-3


def test_the_best_weights_are_restored_after_evaluations_without_a_gain():
    model = torch.nn.Linear(1, 1)
    best = adapters.Best(adapters.Trained(model), patience=2)
    for step, auc in enumerate([0.6, 0.9, 0.9, 0.7], 1):
        assert not best.over
        with torch.no_grad():
            model.weight.fill_(step)
        best.record(auc, step)
    assert best.over
    again = adapters.Best(adapters.Trained(model), patience=2)
    again.load_state_dict(best.state_dict())
    assert again.over
    again.restore()
    assert model.weight.item() == 2


@pytest.mark.parametrize(
    "kind, train, frozen",
    [
        ("vit", "blocks:1", 1),
        ("vit", "lora:2 --last 1", 1),
        ("vit", "blocks:2", 0),
        ("vit", "lora:2", 0),
        ("vit", "norms", 0),
        ("resnet", "blocks:1", 0),
        ("resnet", "lora:2", 0),
    ],
)
def test_blocks_before_the_first_trained_block_are_frozen(kind, train, frozen, tower_of):
    tower, _ = tower_of(kind)
    choose(tower, train)
    assert adapters.frozen_blocks(tower) == frozen


@pytest.mark.parametrize("kind, blocks", [("vit", 2), ("resnet", 0)])
def test_adapters_in_more_blocks_than_the_network_has_are_refused(kind, blocks, tower_of):
    message = f"^--last 3: this network has {blocks} transformer blocks$"
    with pytest.raises(UsageError, match=message):
        adapters.choose_trained(tower_of(kind)[0], "lora:2", 3)


@pytest.mark.parametrize("train, most", [("blocks:3", "2 blocks"), ("lora:129", "at most 128")])
def test_more_than_the_network_has_is_refused(train, most, tower_of):
    with pytest.raises(UsageError, match=f"^--train {train}: .*{most}"):
        adapters.choose_trained(tower_of("vit")[0], train)
