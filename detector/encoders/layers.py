"""What of a vision tower becomes features: CLIP's embedding, the layer before its projection, or outputs of blocks, joined.

    layers = canonical("multi", architecture(visual))      # '8,14,20,final' of a ViT-L/14
    module = with_layers(visual, layers)                    # pixels float32 [n, 3, r, r] -> features [n, d]

`final` and `penultimate` are the numbers as they are. Blocks (of a ViT: the class token after them; of a ResNet: the mean of a stage's
output) are scaled to length 1 each, since those of late blocks are far longer, and joined (RINE: Koutlis and Papadopoulos, ECCV 2024).
"""

import re

from detector.base.errors import EncoderError, UsageError

FORM = re.compile(r"final|penultimate|multi|[0-9]+(,[0-9]+)*(,final)?")
DEPTHS = (
    1 / 3,
    7 / 12,
    5 / 6,
)  # of `multi`: blocks 4, 7 and 10 of 12, which served best in a ViT-B/16


def layers_flag(text):
    """What --layers may be. Raises UsageError."""
    if not FORM.fullmatch(text):
        raise UsageError(
            f"--layers '{text}': name final, penultimate, multi or numbers of blocks such as"
            " 8,14,20"
        )
    return text


def canonical(layers, arch):
    """What --layers says, of a tower with this `architecture` -> the same with its blocks named, in order. Raises EncoderError."""
    depth = arch["layers"] if isinstance(arch["layers"], int) else len(arch["layers"])
    if layers == "multi":
        return ",".join(
            [*map(str, sorted({max(1, round(share * depth)) for share in DEPTHS})), "final"]
        )
    if layers in ("final", "penultimate"):
        return layers
    blocks = sorted({int(number) for number in layers.removesuffix(",final").split(",")})
    if blocks[0] < 1 or blocks[-1] > depth:
        raise EncoderError(f"--layers {layers}: this encoder has blocks 1 to {depth}")
    return ",".join(map(str, blocks)) + (",final" if layers.endswith(",final") else "")


def with_layers(tower, layers):
    """CLIP's VisionTransformer or ModifiedResNet, canonical `layers` -> a module that gives these. The tower is changed."""
    import torch

    if layers == "final":
        return tower
    if layers == "penultimate":
        if hasattr(tower, "transformer"):
            tower.proj = None  # clip.model looks for it
        else:  # its attention multiplies by what is there
            width = tower.attnpool.c_proj.in_features
            tower.attnpool.c_proj = torch.nn.Linear(width, width)
            torch.nn.init.eye_(tower.attnpool.c_proj.weight)
            torch.nn.init.zeros_(tower.attnpool.c_proj.bias)
        return tower.requires_grad_(False)
    return joined(tower, layers.split(","))


def joined(tower, names):
    """-> a module that gives the outputs of these blocks, and the final one if it is named, joined."""
    import torch

    class Joined(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = tower

        def forward(self, pixels):
            outputs, final = (of_transformer if hasattr(tower, "transformer") else of_resnet)(
                self.tower, pixels
            )
            parts = [final if name == "final" else outputs[int(name) - 1] for name in names]
            return torch.cat(
                [torch.nn.functional.normalize(part.float(), dim=1) for part in parts], 1
            )

    return Joined().eval()


def of_transformer(tower, x):
    """As clip.model.VisionTransformer.forward -> (class token after each block, [n, width] each; its result)."""
    import torch

    x = tower.conv1(x).flatten(2).permute(0, 2, 1)
    x = torch.cat(
        [tower.class_embedding.to(x.dtype) + torch.zeros_like(x[:, :1]), x], 1
    ) + tower.positional_embedding.to(x.dtype)
    x, outputs = tower.ln_pre(x).permute(1, 0, 2), []
    for block in tower.transformer.resblocks:
        x = block(x)
        outputs.append(x[0])
    return outputs, tower.ln_post(x[0]) @ tower.proj


def of_resnet(tower, x):
    """As clip.model.ModifiedResNet.forward -> (mean over the picture of each stage's output, [n, channels] each; its result)."""
    for i in (1, 2, 3):
        x = getattr(tower, f"relu{i}")(getattr(tower, f"bn{i}")(getattr(tower, f"conv{i}")(x)))
    x, outputs = tower.avgpool(x), []
    for i in (1, 2, 3, 4):
        x = getattr(tower, f"layer{i}")(x)
        outputs.append(x.float().mean((2, 3)))
    return outputs, tower.attnpool(x)
