"""Training of an encoder: a step of the optimiser, a stored state, a checkpoint and its card.

first = resume(args, key, parts)       # parts: objects with state_dict and load_state_dict
loss = descend(model, batches, optimizer, schedule, scaler, autocast)       # for each step
store(args, key, parts, step)
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
    """One optimiser step over equally large batches (pixels, float32 labels) -> mean loss."""
    import torch

    optimizer.zero_grad()
    total = 0.0
    for pixels, labels in batches:
        with autocast:
            scores = model(pixels)[:, 0]
        target = labels * (1 - SMOOTHING) + SMOOTHING / 2
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores.float(), target)
        loss = loss / len(batches)
        scaler.scale(loss).backward()
        total += loss.item()
    scaler.unscale_(optimizer)
    # without clipping, a long run fell from AUC 0.77 to 0.70
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    # a lower scale means that a gradient left float16's range and the optimiser took no step
    if scaler.get_scale() >= scale:
        schedule.step()
    return total


def arguments(args):
    """The arguments that influence the weights."""
    left_out = ("data_dir", "output", "dry_run")
    values = vars(args).items()
    return {k: v for k, v in values if k not in left_out and v is not None and v is not False}


def training_key(args, rows, *more):
    """Hash of all that influences the weights: arguments, images, and `more`."""
    values = [sorted(arguments(args).items()), sorted(row[3] for row in rows), *more]
    return sha256(repr(values).encode())


def state_file(args):
    return Path(f"{args.output}.state")


def resume(args, key, parts):
    """Load the state beside the output into its parts -> the step to resume from.

    0 if there is no state. Raises UsageError for a damaged state or another `key`.
    """
    import torch

    path = state_file(args)
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location="cpu")
        same = state["of"] == key
    except Exception:  # torch raises almost anything
        raise UsageError(f"{path} is damaged, or no state of a training: remove it first") from None
    if not same:
        raise UsageError(
            f"{path} is the state of a training with other arguments or images: remove it first"
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    say(f"resuming from step {state['step']} ({path})")
    return state["step"]


def store(args, key, parts, step):
    """Write the state after `step` steps. Each step has its own seed, so no more is needed."""
    import torch

    states = {name: part.state_dict() for name, part in parts.items()}
    with atomic_write(state_file(args)) as file:
        torch.save({"step": step, "of": key, **states}, file)


def clip_state_dict(tower):
    """Vision tower -> a state dict for `clip.load`: fp16, with an unused text tower of width 64."""
    from clip.model import CLIP

    stub = CLIP(tower.output_dim, 32, (1, 1, 1, 1), 2, None, 1, 1, 64, 1, 1).state_dict()
    state = {k: v for k, v in stub.items() if not k.startswith("visual.")}
    state |= {f"visual.{k}": v for k, v in tower.state_dict().items()}
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


def save(args, tower, rows, card, seen_before=()):
    """Write the checkpoint and, beside it, the card: arguments, commit and the seen images.

    `seen_before`: images that the start had seen.
    """
    import torch

    card = {
        **card,
        "arguments": arguments(args),
        "commit": code_commit(),
        "torch": torch.__version__,
        "images": len(rows),
        "seen": sorted({row[3][:16] for row in rows} | set(seen_before)),
    }
    # nested, so that both files are written or neither
    with atomic_write(Path(args.output).with_suffix(".json"), "w") as card_file:
        print(json.dumps(card, indent=1), file=card_file, flush=True)
        with atomic_write(args.output) as file:
            torch.save(clip_state_dict(tower), file)
    state_file(args).unlink(missing_ok=True)
