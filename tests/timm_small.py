"""Towers of timm with random weights, a small one of each family, as safetensors.

Random weights hide mistakes (see small_clip.py). So weights, layer scales and batch-norm statistics
are set such that features differ by image. Pooling still leaves them alike, at a cosine up to 0.95.
So comparisons subtract the mean over the images, and planted faults must fail them.
"""

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from small_clip import rounded

from detector.images.preprocessing import Transform, preprocess

# what is special about the tower: its name
FAMILIES = {
    "class token": "vit_tiny_patch16_224.augreg_in21k",
    "class token and registers": "vit_small_patch16_dinov3.lvd1689m",
    "rotary embedding and attention pool": "vit_pe_core_tiny_patch16_384.fb",
    "attention pool, no class token": "vit_base_patch32_siglip_256.v2_webli",
    "ConvNeXt": "convnext_atto.d2_in1k",
    "EfficientNet": "tf_efficientnet_lite0.in1k",
}


def transform_of(name):
    """By timm's own resolution of the settings."""
    data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    numbers = data["mean"], data["std"], data["interpolation"], data["crop_pct"], data["crop_mode"]
    return Transform(data["input_size"][1], *numbers)


def pixels_of(images, name):
    return np.stack([preprocess(image, transform_of(name)) for image in images])


@torch.no_grad()
def save_random(name, path, pixels=None):
    """Write weights of `timm.create_model(name)`. `pixels` give the batch-norm statistics."""
    torch.manual_seed(0)
    tower = timm.create_model(name)
    for key, weight in tower.named_parameters():
        if weight.ndim > 1 and not any(word in key for word in ("pos", "token", "latent")):
            weight.normal_(0, 1.5 / weight[0].numel() ** 0.5)
        elif "gamma" in key:  # of the layer scale, 1e-5 at the start
            weight.fill_(1)
    norms = [m for m in tower.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = None  # no share of the initial statistics
        tower.train()(torch.from_numpy(pixels))
    state = rounded(tower).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def reference(name, path):
    """timm's own tower, without its classifier, with the weights of a file."""
    tower = timm.create_model(name)
    tower.load_state_dict(load_file(path))
    tower.reset_classifier(0)
    return tower.eval()


def outputs_by_hooks(tower, pixels):
    """{'1', ..., 'final': output that hooks see, [n, width]}, by the towers' own attributes."""
    outputs = {}
    blocks = tower.stages if hasattr(tower, "stages") else tower.blocks
    if hasattr(tower, "stage_ends"):  # EfficientNet
        blocks = [tower.blocks[end - 1] for end in tower.stage_ends]

    def pool(x):
        if x.ndim == 4:
            return x.mean((2, 3))
        if tower.cls_token is not None:
            return x[:, 0]
        return x[:, tower.num_prefix_tokens :].mean(1)

    def keep(number):
        return lambda module, inputs, output: outputs.update({str(number): pool(output)})

    hooks = [block.register_forward_hook(keep(i)) for i, block in enumerate(blocks, 1)]
    with torch.inference_mode():
        outputs["final"] = tower(torch.from_numpy(pixels))
    for hook in hooks:
        hook.remove()
    return outputs
