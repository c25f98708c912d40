"""What of a pretrained vision tower is trained, and how that becomes plain weights again. Needs torch.

choose_trained(tower, "lora:8")         # everything else is frozen
checkpoint_blocks(tower)                # less memory, about a third more time
best = Best(model)                      # early stopping: the best trained weights so far
merge(tower)                            # low-rank adapters into the weights that they change
"""

import math
from functools import partial

import torch
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from detector.base.errors import UsageError


class LowRank(torch.nn.Module):
    """A weight [out, in] plus up [out, rank] @ down [rank, in], nothing at first. Hu et al., LoRA, ICLR 2022, with scale 1.

    As a parametrization the network's own code sees a plain weight, also where one matrix holds queries, keys and values.
    """

    def __init__(self, weight, rank):
        super().__init__()
        self.down = torch.nn.Parameter(
            torch.randn(rank, weight.shape[1]) / math.sqrt(weight.shape[1])
        )
        self.up = torch.nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight):
        with torch.autocast(
            weight.device.type, enabled=False
        ):  # the sum must be the one that will be merged
            return torch.addmm(weight, self.up, self.down)


def blocks_of(tower):
    """Transformer blocks of a VisionTransformer, bottlenecks of a ModifiedResNet, in the order in which they run."""
    if hasattr(tower, "transformer"):
        return list(tower.transformer.resblocks)
    return [block for i in (1, 2, 3, 4) for block in getattr(tower, f"layer{i}")]


def choose_trained(tower, train):
    """Freeze all of the tower but what `train` names: 'blocks:K', the last K and what follows them; 'norms', their affine parameters;
    'lora:R', adapters of rank R beside every linear layer and attention. Raises UsageError on more than it has.
    """
    kind, _, number = train.partition(":")
    number = int(number or 0)
    tower.requires_grad_(False)
    if kind == "blocks":
        blocks = blocks_of(tower)
        if number > len(blocks):
            raise UsageError(f"--train blocks:{number}: this network has {len(blocks)} blocks")
        after = [tower.ln_post, tower.proj] if hasattr(tower, "transformer") else [tower.attnpool]
        for part in blocks[-number:] + after:
            part.requires_grad_(True)
    elif kind == "norms":
        for module in tower.modules():
            if isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d)):
                module.requires_grad_(True)
    else:
        layers = {
            torch.nn.MultiheadAttention: "in_proj_weight",
            torch.nn.Linear: "weight",
        }  # the latter: out_proj as well
        found = [
            (module, name)
            for module in tower.modules()
            for of, name in layers.items()
            if isinstance(module, of)
        ]
        most = min(min(getattr(module, name).shape) for module, name in found)
        if number > most:
            raise UsageError(f"--train lora:{number}: the rank is at most {most} in this network")
        for module, name in found:
            parametrize.register_parametrization(
                module, name, LowRank(getattr(module, name), number)
            )


def merge(tower):
    """Every parametrized weight becomes a plain one of the value that it has."""
    for module in list(tower.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            parametrize.remove_parametrizations(module, name)


def checkpoint_blocks(tower):
    """Keep each block's input alone for the backward pass, which computes the rest again."""
    for block in blocks_of(tower):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class Trained:
    """The trained parameters of a model alone, for the state file: the frozen ones are those of the start."""

    def __init__(self, model):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def state_dict(self):
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        for name, p in self.parameters.items():
            p.copy_(state[name])


class Best:
    """Early stopping: the trained weights with the highest AUC on held-out sources, and for how long nothing was better."""

    def __init__(self, trained, patience):
        self.trained, self.patience = trained, patience
        self.found = {"auc": -math.inf, "step": 0, "waited": 0, "weights": None}

    def saw(self, auc, step):
        """Note an evaluation after `step` steps."""
        if auc > self.found["auc"]:
            self.found = {
                "auc": auc,
                "step": step,
                "waited": 0,
                "weights": self.trained.state_dict(),
            }
        else:
            self.found["waited"] += 1

    @property
    def over(self):
        return self.found["waited"] >= self.patience

    def state_dict(self):
        return self.found

    def load_state_dict(self, state):
        self.found = state

    def restore(self):
        """The weights of the best evaluation; without one the last stay."""
        if self.found["weights"] is not None:
            self.trained.load_state_dict(self.found["weights"])
