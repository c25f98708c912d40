"""What every training of an encoder does: a step, going on after an interruption, a checkpoint and its card. Used by finetune_clip.py.

first = resume(args, of, parts)                                             # parts: what has state_dict and load_state_dict
loss = descend(model, batches, optimizer, schedule, scaler, autocast)       # for each step
store(args, of, parts, step)
save(args, tower, rows, {"auc": 0.9})
"""

import json
from pathlib import Path

from detector.base.console import say
from detector.base.errors import UsageError
from detector.base.files import atomic_write, sha256
from detector.base.project import code_commit

SMOOTHING = 0.05  # a few percent of the labels are wrong


def descend(model, batches, optimizer, schedule, scaler, autocast):
    """One step of the optimiser over a list of equally large batches (pixels, float32 labels) -> their mean loss."""
    import torch

    optimizer.zero_grad()
    total = 0.0
    for pixels, labels in batches:
        with autocast:
            scores = model(pixels)[:, 0]
        target = labels * (1 - SMOOTHING) + SMOOTHING / 2
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores.float(), target) / len(
            batches
        )
        scaler.scale(loss).backward()
        total += loss.item()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(
        model.parameters(), 1.0
    )  # without it a long run fell from AUC 0.77 to 0.70
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    if (
        scaler.get_scale() >= scale
    ):  # else a gradient left float16's range, and the optimiser took no step
        schedule.step()
    return total


def arguments(args):
    """What shapes the weights, besides the images."""
    left_out = ("data_dir", "output", "dry_run")
    return {
        k: v
        for k, v in vars(args).items()
        if k not in left_out and v is not None and v is not False
    }


def training_key(args, rows, *more):
    """What a stored state belongs to: arguments and images, and the rest that shapes the weights."""
    return sha256(
        repr([sorted(arguments(args).items()), sorted(row[3] for row in rows), *more]).encode()
    )


def state_file(args):
    return Path(f"{args.output}.state")


def resume(args, of, parts):
    """The state beside the output into its parts -> the step to go on from, 0 where there is none. Raises UsageError."""
    import torch

    path = state_file(args)
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location="cpu")
        others = state["of"] != of
    except Exception:  # torch raises almost anything
        raise UsageError(f"{path} is damaged, or no state of a training: remove it first") from None
    if others:
        raise UsageError(
            f"{path} is the state of a training with other arguments or images: remove it first"
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    say(f"going on from step {state['step']} ({path})")
    return state["step"]


def store(args, of, parts, step):
    """The state after `step` steps; each step draws from its own seed, so nothing else is needed to go on."""
    import torch

    with atomic_write(state_file(args)) as file:
        torch.save({"step": step, "of": of, **{k: v.state_dict() for k, v in parts.items()}}, file)


def clip_state_dict(tower):
    """Vision tower -> a state dict as `clip.load` wants it: fp16, beside a text tower of width 64 that nobody uses."""
    from clip.model import CLIP

    stub = CLIP(tower.output_dim, 32, (1, 1, 1, 1), 2, None, 1, 1, 64, 1, 1).state_dict()
    state = {k: v for k, v in stub.items() if not k.startswith("visual.")}
    state |= {f"visual.{k}": v for k, v in tower.state_dict().items()}
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


def save(args, tower, rows, card, seen_before=()):
    """Checkpoint and, beside it, the card: arguments, commit and which images the encoder has seen, now or before."""
    import torch

    card = {
        **card,
        "arguments": arguments(args),
        "commit": code_commit(),
        "torch": torch.__version__,
        "images": len(rows),
        "seen": sorted({row[3][:16] for row in rows} | set(seen_before)),
    }
    with atomic_write(Path(args.output).with_suffix(".json"), "w") as beside:  # both, or neither
        print(json.dumps(card, indent=1), file=beside, flush=True)
        with atomic_write(args.output) as file:
            torch.save(clip_state_dict(tower), file)
    state_file(args).unlink(missing_ok=True)
