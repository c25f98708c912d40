"""Choose the trained part of a vision tower, and merge it into plain weights. Needs torch.

choose_trained(tower, "lora:8", last=4) # everything else is frozen
frozen_blocks(tower)                    # 8 of ViT-B/16: their outputs never change
checkpoint_blocks(tower)                # less memory, about a third more time
best = Best(Trained(model), patience=5) # early stopping: the best trained weights so far
merge(tower)                            # adds low-rank adapters to the weights that they change
"""

import math
from functools import partial

import torch
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from detector.base.errors import UsageError


class LowRank(torch.nn.Module):
    """A weight [out, in] plus up [out, rank] @ down [rank, in], which starts at 0.

    Hu et al., LoRA, ICLR 2022, with scale 1. It is a parametrization, so the network's own code
    sees a plain weight, also where a single matrix holds queries, keys and values.
    """

    def __init__(self, weight, rank):
        super().__init__()
        outputs, inputs = weight.shape
        self.down = torch.nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.up = torch.nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight):
        # in full precision, so that the sum equals the merged weight
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.up, self.down)


def blocks_of(tower):
    """Blocks of a VisionTransformer or bottlenecks of a ModifiedResNet, in running order."""
    if hasattr(tower, "transformer"):
        return list(tower.transformer.resblocks)
    return [block for i in (1, 2, 3, 4) for block in getattr(tower, f"layer{i}")]


def choose_trained(tower, train, last=None):
    """Freeze all of the tower except what `train` names.

    'blocks:K': the last K blocks and the layers after them. 'norms': the affine parameters of the
    norms. 'lora:R': adapters of rank R beside every linear layer and attention. `last`: those of
    the last blocks of a transformer alone. Raises UsageError for a number above what the tower has.
    """
    kind, _, number = train.partition(":")
    tower.requires_grad_(False)
    part = tower if last is None else last_blocks(tower, last)
    if kind == "blocks":
        train_blocks(tower, int(number))
    elif kind == "norms":
        for module in part.modules():
            if isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d)):
                module.requires_grad_(True)
    else:
        add_adapters(part, int(number))


def last_blocks(tower, number):
    blocks = tower.transformer.resblocks if hasattr(tower, "transformer") else []
    if number > len(blocks):
        raise UsageError(f"--last {number}: this network has {len(blocks)} transformer blocks")
    return blocks[-number:]


def frozen_blocks(tower):
    """Number of blocks of a transformer before the first trained block. 0 for a ResNet."""
    blocks = tower.transformer.resblocks if hasattr(tower, "transformer") else []
    trained = (any(p.requires_grad for p in block.parameters()) for block in blocks)
    return next((i for i, is_trained in enumerate(trained) if is_trained), 0)


def train_blocks(tower, number):
    blocks = blocks_of(tower)
    if number > len(blocks):
        raise UsageError(f"--train blocks:{number}: this network has {len(blocks)} blocks")
    after = [tower.ln_post, tower.proj] if hasattr(tower, "transformer") else [tower.attnpool]
    for part in blocks[-number:] + after:
        part.requires_grad_(True)


def add_adapters(tower, rank):
    # Linear includes the out_proj of an attention
    layers = {torch.nn.MultiheadAttention: "in_proj_weight", torch.nn.Linear: "weight"}
    weights = [
        (module, name)
        for module in tower.modules()
        for kind, name in layers.items()
        if isinstance(module, kind)
    ]
    most = min(min(getattr(module, name).shape) for module, name in weights)
    if rank > most:
        raise UsageError(f"--train lora:{rank}: the rank is at most {most} in this network")
    for module, name in weights:
        adapter = LowRank(getattr(module, name), rank)
        parametrize.register_parametrization(module, name, adapter)


def merge(tower):
    """Turn every parametrized weight into a plain weight of the same value."""
    for module in list(tower.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            parametrize.remove_parametrizations(module, name)


def checkpoint_blocks(tower):
    """Keep only each block's input for the backward pass, which computes the rest again."""
    for block in blocks_of(tower):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class Trained:
    """The trained parameters of a model, for the state file. The frozen ones never change."""

    def __init__(self, model):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def state_dict(self):
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        for name, p in self.parameters.items():
            p.copy_(state[name])


class Best:
    """Early stopping: the trained weights with the highest AUC on held-out sources.

    `over` is true after `patience` evaluations without a higher AUC.
    """

    def __init__(self, trained, patience):
        self.trained, self.patience = trained, patience
        self.state = {"auc": -math.inf, "step": 0, "waited": 0, "weights": None}

    def record(self, auc, step):
        """Note an evaluation after `step` steps."""
        if auc > self.state["auc"]:
            weights = self.trained.state_dict()
            self.state = {"auc": auc, "step": step, "waited": 0, "weights": weights}
        else:
            self.state["waited"] += 1

    @property
    def over(self):
        return self.state["waited"] >= self.patience

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state

    def restore(self):
        """Load the weights of the best evaluation. Without an evaluation the last weights stay."""
        if self.state["weights"] is not None:
            self.trained.load_state_dict(self.state["weights"])
