"""A vision transformer in two parts: frozen first blocks, and the last blocks that are trained.

tail = Tail(tower, 8)             # eight frozen blocks
tokens = tail.first(pixels)     # float32 [n, 3, r, r] -> [n, tokens, width]; run once
features = tail(tokens)         # -> [n, d], equal to tower(pixels) up to rounding

It computes what clip/model.py does with less work in training. An adapter's frozen weight gets no
gradient. The last block computes its output for the class token alone, because no other is used.
Needs torch.
"""

from functools import partial

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


def adapted(x, module, name, rows=slice(None)):
    """x [..., in] -> x @ weight[rows].T + bias[rows]. `name` is that of the weight."""
    bias = getattr(module, name.replace("weight", "bias"))[rows]
    if not parametrize.is_parametrized(module, name):
        return linear(x, getattr(module, name)[rows], bias)
    weight = module.parametrizations[name]
    change = linear(linear(x, weight[0].down), weight[0].up[rows])
    return linear(x, weight.original[rows], bias) + change


def run_block(block, tokens, wanted):
    """Tokens [n, t, width] -> output [n, wanted, width] of a block for the first of them."""
    width, heads = tokens.shape[2], block.attn.num_heads
    inner = block.ln_1(tokens)
    query = adapted(inner[:, :wanted], block.attn, "in_proj_weight", slice(width))
    others = adapted(inner, block.attn, "in_proj_weight", slice(width, None)).chunk(2, -1)
    parts = [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, *others)]
    inner = scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    tokens = tokens[:, :wanted] + adapted(inner, block.attn.out_proj, "weight")
    inner = block.mlp.gelu(adapted(block.ln_2(tokens), block.mlp.c_fc, "weight"))
    return tokens + adapted(inner, block.mlp.c_proj, "weight")


class Tail(torch.nn.Module):
    """All of a VisionTransformer but its `frozen` first blocks and what is before them."""

    def __init__(self, tower, frozen, checkpointing=False):
        super().__init__()
        self.tower, self.frozen = tower, frozen
        self.run = (
            partial(checkpoint, run_block, use_reentrant=False) if checkpointing else run_block
        )

    def first(self, pixels):
        """Normalised pixels [n, 3, r, r] -> tokens [n, tokens, width] after the frozen blocks."""
        tower = self.tower
        patches = tower.conv1(pixels).flatten(2).transpose(1, 2)
        begin = tower.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        tokens = torch.cat([begin, patches], 1) + tower.positional_embedding.to(patches.dtype)
        tokens = tower.ln_pre(tokens)
        for block in tower.transformer.resblocks[: self.frozen]:
            tokens = run_block(block, tokens, tokens.shape[1])
        return tokens

    def forward(self, tokens):
        *blocks, last = self.tower.transformer.resblocks[self.frozen :]
        for block in blocks:
            tokens = self.run(block, tokens, tokens.shape[1])
        token = self.run(last, tokens, 1)[:, 0]
        return self.tower.ln_post(token) @ self.tower.proj
