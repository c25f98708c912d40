"""Small CLIP checkpoints with random weights, in both file forms that OpenAI's format knows; used by several tests.

Random weights hide mistakes: as torch initialises them, all images get nearly the same features, so swapped channels
or a wrong number of heads change next to nothing. So the weights are scaled and the batch-norm statistics come from
photographs, until most different images fall below cosine 0.5; and comparisons subtract the mean over the images.
"""

import warnings

import clip.model
import numpy as np
import torch
from PIL import Image

from detector.finetuning.descent import clip_state_dict
from detector.images import preprocessing


def crops(photos):
    """Sixteen different pictures: each photograph as it is, and a turned corner of it."""
    images = [Image.open(path).convert("RGB") for path in photos.values()]
    return images + [
        i.crop((0, 0, i.width // 3, i.height // 2)).transpose(Image.Transpose.ROTATE_90)
        for i in images
    ]


def pixels_of(images, resolution):
    return np.stack([preprocessing.preprocess(image, resolution) for image in images])


def small_vit(images, seed=0, resolution=64):
    """VisionTransformer of width 128; `clip.load` will derive 128 // 64 = 2 heads."""
    torch.manual_seed(seed)
    tower = clip.model.VisionTransformer(resolution, 16, 128, 2, 2, 32)
    with torch.no_grad():
        for _, weight in tower.transformer.named_parameters():
            if weight.ndim > 1:
                weight.mul_(2.5)
    return rounded(tower)


def small_resnet(images, seed=0, resolution=96):
    """ModifiedResNet of width 32; `clip.load` will derive 32 * 32 // 64 = 16 heads."""
    torch.manual_seed(seed)
    tower = clip.model.ModifiedResNet([1, 1, 1, 1], 32, 16, resolution, 32)
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if name.endswith("bn3.weight") and name.startswith("layer"):
                weight.fill_(
                    0.1
                )  # the shortcuts dominate: else bfloat16's roundings grow from layer to layer
            if name.startswith("attnpool") and weight.ndim > 1:
                weight.mul_(
                    4 if "q_proj" in name or "k_proj" in name else 2
                )  # attention that depends on the heads
        for module in tower.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = (
                    None  # statistics are those of the images, with no share of the initial ones
                )
        tower.train()(torch.from_numpy(pixels_of(images, resolution)))
    return rounded(tower)


SMALL = {"vit": small_vit, "resnet": small_resnet}


@torch.no_grad()
def rounded(tower):
    """All numbers rounded to fp16, as OpenAI ships them: what is compared is arithmetic, not storage."""
    for tensor in (*tower.parameters(), *tower.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(tensor.half().float())
    return tower.eval()


def save_state_dict(tower, path):
    torch.save(clip_state_dict(tower), path)
    return path


def save_archive(tower, path):
    """The form in which OpenAI ships: a TorchScript archive, fp16, with three numbers as buffers."""
    if hasattr(tower, "transformer"):
        shape = tower.transformer.layers, tower.conv1.out_channels, tower.conv1.kernel_size[0]
    else:
        shape = (
            tuple(len(getattr(tower, f"layer{i}")) for i in (1, 2, 3, 4)),
            2 * tower.conv1.out_channels,
            None,
        )
    model = clip.model.CLIP(tower.output_dim, tower.input_resolution, *shape, 1, 1, 64, 1, 1)
    model.load_state_dict(clip_state_dict(tower))
    for name, value in (
        ("input_resolution", tower.input_resolution),
        ("context_length", 1),
        ("vocab_size", 1),
    ):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    example = (
        torch.zeros(1, 3, tower.input_resolution, tower.input_resolution),
        torch.zeros(1, 1, dtype=torch.long),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer doubts the asserts in multi-head attention
        torch.jit.trace(model.eval(), example).half().save(path)
    return path


def arrays_of(tower):
    """A tower -> {name: array}, as weights.read_checkpoint reads its checkpoint."""
    state = tower.state_dict().items()
    return {
        name: (value.half() if value.is_floating_point() else value).numpy()
        for name, value in state
    }


FORMS = {"state dict": save_state_dict, "archive": save_archive}


def centred_cosines(features, reference):
    """Per image: cosine of the two features after the reference's mean over all images is subtracted from both."""
    a, b = features - reference.mean(0), reference - reference.mean(0)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def pairwise_cosines(features):
    """Plain cosines of all pairs of different images."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]
