"""What of a pretrained tower is trained, and how it becomes plain weights again: small towers of both kinds, random weights."""

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
    found = small_clip.crops(photos)
    return found + [image.transpose(0) for image in found]


@pytest.fixture(scope="module")
def labels():
    return torch.from_numpy(
        np.random.default_rng(0).permutation(32) % 2
    ).float()  # nothing to learn: to be known by heart


@pytest.fixture
def tower_of(images):
    """Function: 'vit' or 'resnet' -> (tower, pixels of the 32 pictures); the same weights at every call."""

    def make(kind):
        tower = small_clip.SMALL[kind](images[:16], resolution={"vit": 32, "resnet": 64}[kind])
        return tower, torch.from_numpy(small_clip.pixels_of(images, tower.input_resolution))

    return make


def with_head(tower):
    torch.manual_seed(1)
    return torch.nn.Sequential(tower, torch.nn.Linear(tower.output_dim, 1)).eval()


def run(model, steps, make=torch.optim.AdamW, lr=1e-2, scaler=None, dtype=torch.float32):
    """Steps (lists of batches) -> the loss of each; the learning rate halves with every step of the schedule if `scaler` is given."""
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5 if scaler else 1.0)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return [
        descend(model, batches, optimizer, schedule, scaler, autocast) for batches in steps
    ], optimizer


def changed(before, tower):
    after = tower.state_dict()
    assert after.keys() == before.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def is_trained(name, kind, train):
    """Is the tensor of this name in a small tower (2 blocks, 1-1-1-1 bottlenecks) one that `train` names?"""
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
    }
    return of[kind, train]


@pytest.mark.parametrize("train", ["blocks:1", "norms", "lora:2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_changes_the_named_parameters_and_no_other(kind, train, tower_of, labels):
    tower, pixels = tower_of(kind)
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    adapters.choose_trained(tower, train)
    run(with_head(tower), [[(pixels[:8], labels[:8])]] * 2)
    adapters.merge(tower)
    found, named = (
        changed(before, tower),
        {name for name in before if is_trained(name, kind, train)},
    )
    # keys' biases shift all scores of a query alike, so softmax leaves them without a gradient
    assert named and named - {"attnpool.k_proj.bias"} <= found <= named


@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapters_give_the_features_that_they_gave_beside_the_weights(kind, tower_of):
    tower, pixels = tower_of(kind)
    names = tower.state_dict().keys()
    with torch.no_grad():
        untouched = tower(pixels)
        adapters.choose_trained(tower, "lora:4")
        assert torch.equal(tower(pixels), untouched)  # nothing at first
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
def test_checkpointing_computes_the_blocks_twice_and_gives_the_same_gradients(
    kind, train, tower_of, labels
):
    found, passes = [], []
    for checkpointing in (False, True):
        tower, pixels = tower_of(kind)
        adapters.choose_trained(tower, train)
        model, count = with_head(tower), []
        inside = tower.transformer.resblocks[-1].ln_1 if kind == "vit" else tower.layer4[-1].conv1
        inside.register_forward_pre_hook(lambda *_: count.append(1))
        if checkpointing:
            adapters.checkpoint_blocks(tower)
        run(model, [[(pixels[:8], labels[:8])]], torch.optim.SGD)
        found.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        )
        passes.append(len(count))
    assert passes == [1, 2] and len(found[0]) > 2
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_two_batches_of_eight_make_the_step_of_one_of_sixteen(tower_of, labels):
    weights, losses = [], []
    for parts in (1, 2):
        tower, pixels = tower_of("vit")
        adapters.choose_trained(tower, "blocks:2")
        model = with_head(tower)
        batches = list(zip(pixels[:16].chunk(parts), labels[:16].chunk(parts)))
        assert [len(part) for part, _ in batches] == [16 // parts] * parts
        losses.append(run(model, [batches] * 3, torch.optim.SGD)[0])
        weights.append(adapters.Trained(model).state_dict())
    assert losses[0][0] > losses[0][-1] and losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("train", ["blocks:2", "norms", "lora:8"])
def test_thirty_two_images_with_drawn_labels_are_learnt_by_heart(train, tower_of, labels):
    tower, pixels = tower_of("vit")
    adapters.choose_trained(tower, train)
    model = with_head(tower)
    losses, _ = run(
        model,
        [[(pixels, labels)]] * 60,
        lr={"blocks:2": 1e-3, "norms": 1e-2, "lora:8": 5e-3}[train],
    )
    with torch.inference_mode():
        right = (model(pixels)[:, 0] > 0) == labels.bool()
    assert (
        losses[0] > 0.6 and losses[-1] < 0.2 and right.all()
    )  # 0.117 is the least that smoothed labels leave


def test_a_float16_step_whose_gradients_leave_the_range_is_passed_over_and_the_next_is_taken(
    tower_of, labels
):
    tower, pixels = tower_of("vit")
    adapters.choose_trained(tower, "lora:4")
    model = with_head(tower)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-50)
    before = adapters.Trained(model).state_dict()
    _, optimizer = run(model, [[(pixels, labels)]], scaler=scaler, dtype=torch.float16)
    assert scaler.get_scale() == 2.0**10 and optimizer.param_groups[0]["lr"] == 1e-2
    assert all(
        torch.equal(before[name], weight)
        for name, weight in adapters.Trained(model).state_dict().items()
    )
    losses, optimizer = run(model, [[(pixels, labels)]] * 2, scaler=scaler, dtype=torch.float16)
    assert losses[1] < losses[0] and optimizer.param_groups[0]["lr"] == 2.5e-3


def test_the_best_weights_come_back_after_evaluations_without_gain():
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


@pytest.mark.parametrize("train, most", [("blocks:3", "2 blocks"), ("lora:129", "at most 128")])
def test_more_than_the_network_has_is_refused(train, most, tower_of):
    with pytest.raises(UsageError, match=f"^--train {train}: .*{most}"):
        adapters.choose_trained(tower_of("vit")[0], train)
