"""Choose which layers of a vision tower give the features.

    layers = canonical("multi", architecture(visual))  # '8,14,20,final' for a ViT-L/14
    module = with_layers(visual, layers)  # pixels float32 [n, 3, r, r] -> features [n, d]

`final` is CLIP's embedding, `penultimate` the layer before its projection. Of a tower of timm they
are the pooled output and the last block. Both are left unscaled. A block of a ViT gives its class
token, or the mean of its patches where there is no class token. A stage of a convolutional network
gives the mean of its output. Each block's output is scaled to length 1, because late blocks have
far longer outputs. Then the outputs are joined (RINE: Koutlis and Papadopoulos, ECCV 2024).
"""

import inspect
import re

from detector.base.errors import EncoderError, UsageError

FORM = re.compile(r"final|penultimate|multi|[0-9]+(,[0-9]+)*(,final)?")
# relative depths of `multi`: blocks 4, 7 and 10 of 12, the best choice measured on a ViT-B/16
DEPTHS = (1 / 3, 7 / 12, 5 / 6)


def layers_flag(text):
    """Check a value of --layers and return it. Raises UsageError."""
    if not FORM.fullmatch(text):
        raise UsageError(
            f"--layers '{text}': name final, penultimate, multi or numbers of blocks "
            "such as 8,14,20"
        )
    return text


def canonical(layers, arch):
    """Value of --layers and an `architecture` -> the layers with block numbers, in order.

    Raises EncoderError.
    """
    depth = arch["layers"] if isinstance(arch["layers"], int) else len(arch["layers"])
    if layers == "multi":
        blocks = sorted({max(1, round(share * depth)) for share in DEPTHS})
        return ",".join([*map(str, blocks), "final"])
    if layers in ("final", "penultimate"):
        return layers
    blocks = sorted({int(number) for number in layers.removesuffix(",final").split(",")})
    if blocks[0] < 1 or blocks[-1] > depth:
        raise EncoderError(f"--layers {layers}: this encoder has blocks 1 to {depth}")
    return ",".join(map(str, blocks)) + (",final" if layers.endswith(",final") else "")


def with_layers(tower, layers):
    """Tower -> a module with the output of canonical `layers`. Changes the tower."""
    import torch

    if layers == "final":
        return tower
    if layers == "penultimate" and not hasattr(tower, "forward_intermediates"):
        if hasattr(tower, "transformer"):
            tower.proj = None  # clip.model then skips the projection
        else:  # clip.model always projects here: make the projection an identity
            width = tower.attnpool.c_proj.in_features
            tower.attnpool.c_proj = torch.nn.Linear(width, width)
            torch.nn.init.eye_(tower.attnpool.c_proj.weight)
            torch.nn.init.zeros_(tower.attnpool.c_proj.bias)
        return tower.requires_grad_(False)
    return joined(tower, layers.split(","))


def run_of(tower):
    """Tower -> its function: pixels -> (output of each block or stage, final output)."""
    if hasattr(tower, "forward_intermediates"):
        return timm_outputs
    return transformer_outputs if hasattr(tower, "transformer") else resnet_outputs


def joined(tower, names):
    """Tower and names -> a module with their joined outputs.

    Names are block numbers and 'final', or 'penultimate' alone: the last block, unscaled.
    """
    import torch

    run = run_of(tower)

    class Joined(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = tower

        def forward(self, pixels):
            outputs, final = run(self.tower, pixels)
            if names == ["penultimate"]:
                return outputs[-1]
            parts = [final if name == "final" else outputs[int(name) - 1] for name in names]
            return torch.cat(
                [torch.nn.functional.normalize(part.float(), dim=1) for part in parts], 1
            )

    return Joined().eval()


def transformer_outputs(tower, x):
    """The steps of clip.model.VisionTransformer.forward -> (class token after each block, output).

    Each class token has the shape [n, width].
    """
    import torch

    x = tower.conv1(x).flatten(2).permute(0, 2, 1)
    class_token = tower.class_embedding.to(x.dtype) + torch.zeros_like(x[:, :1])
    x = torch.cat([class_token, x], 1) + tower.positional_embedding.to(x.dtype)
    x, outputs = tower.ln_pre(x).permute(1, 0, 2), []
    for block in tower.transformer.resblocks:
        x = block(x)
        outputs.append(x[0])
    return outputs, tower.ln_post(x[0]) @ tower.proj


def resnet_outputs(tower, x):
    """The steps of clip.model.ModifiedResNet.forward -> (mean output of each stage, output).

    The mean is over the positions, with the shape [n, channels].
    """
    for i in (1, 2, 3):
        x = getattr(tower, f"relu{i}")(getattr(tower, f"bn{i}")(getattr(tower, f"conv{i}")(x)))
    x, outputs = tower.avgpool(x), []
    for i in (1, 2, 3, 4):
        x = getattr(tower, f"layer{i}")(x)
        outputs.append(x.float().mean((2, 3)))
    return outputs, tower.attnpool(x)


def timm_outputs(tower, x):
    """`forward_intermediates` of timm -> (output of each block or stage, pooled output).

    A block's output is its class token, or the mean of its patches where there is no class token.
    """
    flag = "return_prefix_tokens"
    prefixed = flag in inspect.signature(tower.forward_intermediates).parameters
    prefixed = prefixed and tower.num_prefix_tokens > 0
    final, blocks = tower.forward_intermediates(x, **({flag: True} if prefixed else {}))
    if prefixed and getattr(tower, "cls_token", None) is not None:
        parts = [prefix[:, 0] for _, prefix in blocks]
    else:
        parts = [(block[0] if prefixed else block).mean((2, 3)) for block in blocks]
    return parts, tower.forward_head(final, pre_logits=True)
