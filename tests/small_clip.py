"""Small CLIP checkpoints with random weights, in both file forms of OpenAI's format.

Random weights hide mistakes. With torch's initial weights all images get nearly the same features,
so swapped channels or wrong heads change almost nothing. So the weights are scaled, and photographs
give the batch-norm statistics, until most different images fall below cosine 0.5. Comparisons
subtract the mean over the images.
"""

import warnings

import clip.model
import numpy as np
import torch
from PIL import Image

from detector.encoders.closeness import cosines
from detector.finetuning.descent import clip_state_dict
from detector.images import preprocessing


def crops(photos):
    """Sixteen different images: each photograph, and a rotated corner of each."""
    images = [Image.open(path).convert("RGB") for path in photos.values()]
    return images + [
        i.crop((0, 0, i.width // 3, i.height // 2)).transpose(Image.Transpose.ROTATE_90)
        for i in images
    ]


def pixels_of(images, resolution):
    transform = preprocessing.clip_transform(resolution)
    return np.stack([preprocessing.preprocess(image, transform) for image in images])


def small_vit(images, seed=0, resolution=64):
    """VisionTransformer of width 128; `clip.load` derives 128 // 64 = 2 heads."""
    torch.manual_seed(seed)
    tower = clip.model.VisionTransformer(resolution, 16, 128, 2, 2, 32)
    with torch.no_grad():
        for _, weight in tower.transformer.named_parameters():
            if weight.ndim > 1:
                weight.mul_(2.5)
    return rounded(tower)


def small_resnet(images, seed=0, resolution=96):
    """ModifiedResNet of width 32; `clip.load` derives 32 * 32 // 64 = 16 heads."""
    torch.manual_seed(seed)
    tower = clip.model.ModifiedResNet([1, 1, 1, 1], 32, 16, resolution, 32)
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if name.endswith("bn3.weight") and name.startswith("layer"):
                weight.fill_(0.1)  # weak branches: else bfloat16's rounding grows with the depth
            if name.startswith("attnpool") and weight.ndim > 1:
                # strong attention depends on the number of heads
                weight.mul_(4 if "q_proj" in name or "k_proj" in name else 2)
        for module in tower.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # no share of the initial statistics
        tower.train()(torch.from_numpy(pixels_of(images, resolution)))
    return rounded(tower)


SMALL = {"vit": small_vit, "resnet": small_resnet}


@torch.no_grad()
def rounded(tower):
    """Round all numbers to fp16, as OpenAI ships them, so storage changes no number."""
    for tensor in (*tower.parameters(), *tower.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(tensor.half().float())
    return tower.eval()


def save_state_dict(tower, path):
    torch.save(clip_state_dict(tower), path)
    return path


def save_archive(tower, path):
    """Save OpenAI's form: a TorchScript archive, fp16, with three numbers as buffers."""
    if hasattr(tower, "transformer"):
        shape = tower.transformer.layers, tower.conv1.out_channels, tower.conv1.kernel_size[0]
    else:
        depths = tuple(len(getattr(tower, f"layer{i}")) for i in (1, 2, 3, 4))
        shape = depths, 2 * tower.conv1.out_channels, None
    model = clip.model.CLIP(tower.output_dim, tower.input_resolution, *shape, 1, 1, 64, 1, 1)
    model.load_state_dict(clip_state_dict(tower))
    side = tower.input_resolution
    for name, value in {"input_resolution": side, "context_length": 1, "vocab_size": 1}.items():
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    example = torch.zeros(1, 3, side, side), torch.zeros(1, 1, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of asserts in multi-head attention
        torch.jit.trace(model.eval(), example).half().save(path)
    return path


def arrays_of(tower):
    """Tower -> {name: array}, as weights.read_checkpoint returns them."""
    state = tower.state_dict().items()
    return {
        name: (value.half() if value.is_floating_point() else value).numpy()
        for name, value in state
    }


FORMS = {"state dict": save_state_dict, "archive": save_archive}


def centred_cosines(features, reference):
    """Cosine of each image's two features, both minus the reference's mean over the images."""
    return cosines(features - reference.mean(0), reference - reference.mean(0))


def clip_load(path):
    """clip.load on the CPU -> (model, transform)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tries torch.jit.load first, which is deprecated
        return clip.load(str(path), device="cpu")


def outputs_by_hooks(tower, pixels):
    """{block number, 'final' or for a ViT 'penultimate': output that hooks see, [n, width]}.

    The keys are text. A ViT gives class tokens, a ResNet the mean over the positions.
    """
    outputs, is_vit = {}, hasattr(tower, "transformer")
    blocks = (
        tower.transformer.resblocks
        if is_vit
        else [tower.get_submodule(f"layer{i}") for i in (1, 2, 3, 4)]
    )

    def keep(name, change):
        return lambda module, inputs, output: outputs.update({name: change(output)})

    pool = (lambda output: output[0]) if is_vit else (lambda output: output.mean((2, 3)))
    hooks = [b.register_forward_hook(keep(str(i), pool)) for i, b in enumerate(blocks, 1)]
    if is_vit:
        hooks.append(tower.ln_post.register_forward_hook(keep("penultimate", torch.clone)))
    with torch.inference_mode():
        outputs["final"] = tower(torch.from_numpy(pixels))
    for hook in hooks:
        hook.remove()
    return outputs


def joined(outputs, names):
    """Outputs of these names, each scaled to length 1 and joined, as numpy's array."""
    parts = [outputs[name] for name in names]
    return torch.cat([part / part.norm(dim=1, keepdim=True) for part in parts], 1).numpy()


def encode(forward, pixels, size):
    """Features of pixels, `size` images at a time."""
    return np.concatenate([forward(pixels[i : i + size]) for i in range(0, len(pixels), size)])


def pairwise_cosines(features):
    """Cosines of all pairs of different images."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]
