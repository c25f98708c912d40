"""Labelled images -> an encoder of one's own, as a checkpoint that `clip.load` and prepare_clip.py accept.

    python finetune_clip.py --arch tiny-resnet --data_dir DIR --output tiny.pt
    python prepare_clip.py --clip_model tiny.pt
    CLIP_MODEL=tiny.pt python extract_features.py --data_dir DIR

A classifier must be trained on images that its encoder has not seen: on seen ones the scores are far too good, and
with them the threshold and the calibration. So `--keep` holds back a share of `train`, the seen ones are listed in
tiny.json beside the checkpoint, and extract_features.py marks their rows as split 'seen'.
"""
import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import common
from common import UsageError
from prepare_clip import require_torch

ARCHITECTURES = {  # arguments of clip.model.ModifiedResNet; heads follow from the width as `clip.load` derives them
    "tiny-resnet": dict(layers=[2, 2, 2, 2], output_dim=128, heads=20 * 32 // 64, input_resolution=160, width=20),
}
AVERAGE = 0.998          # weights averaged by this factor a step: worth about 3 points of AUC
NOTICE = "this encoder is a demonstration, trained from scratch on a few thousand images: not a detector to rely on"
PRECISION = "float32"    # how `auto` runs it: bfloat16 saves 0.7 ms an image here and turns 4 of 1,425 verdicts
SAVE_EVERY = 200         # steps between stored states
SIDE = 768               # all images are held in memory, shrunk to this long side: for thousands, not for millions
SMOOTHING = 0.05         # a few percent of the labels are wrong


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=common.Help)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="tiny-resnet", help="network, trained from scratch")
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="labelled images, as for extract_features.py")
    parser.add_argument("--output", default="finetuned.pt", metavar="FILE", help="checkpoint to write")
    parser.add_argument("--train_splits", default="train,extra", metavar="A,B", help="splits to learn from")
    parser.add_argument("--keep", type=float, default=0.5, metavar="SHARE",
                        help="share of 'train' that is kept from the encoder, for the classifier")
    parser.add_argument("--steps", type=int, default=4000, metavar="N", help="optimiser steps")
    parser.add_argument("--batch_size", type=int, default=48, metavar="N", help="images a step, on average half of each class")
    parser.add_argument("--lr", type=float, default=1e-3, metavar="X", help="peak learning rate (AdamW, cosine)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and of every draw")
    args = parser.parse_args(argv)
    common.need_folder(args.data_dir)
    return args


if __name__ == "__main__":  # --help and wrong flags are answered now, before what takes a second to import
    common.answered(parse_args)

import imaging  # noqa: E402
from dataset import list_images  # noqa: E402


def kept_back(digest, share):
    """Is the image with this SHA-256 kept from the encoder? Decided by its content, so equal files stay together."""
    return int(digest[:8], 16) < share * 2**32


def load_images(args):
    """-> rows (PIL RGB image, label, source, sha256) of the chosen splits, and the same of those kept back."""
    from distort import fit
    from tqdm import tqdm
    splits, seen, kept = args.train_splits.split(","), [], []
    for entry in tqdm([e for e in list_images(args.data_dir) if e.split in splits], desc="reading", unit="image"):
        data = common.read_bytes(Path(args.data_dir, entry.path))
        try:
            row = fit(imaging.decode_image(data), SIDE), entry.label, entry.source, common.sha256(data)
        except common.ImageError as error:
            tqdm.write(f"left out {entry.path}: {error}", file=sys.stderr)
            continue
        (kept if entry.split == "train" and kept_back(row[3], args.keep) else seen).append(row)
    if len({row[1] for row in seen}) < 2:
        raise UsageError(f"--data_dir {args.data_dir}: no images of both classes in the splits {args.train_splits}")
    return seen, kept


def balanced_draw(rows):
    """Probability of each image: half of the mass to each class, within it to sources by the root of their size."""
    import numpy as np
    labels, sources = [r[1] for r in rows], [r[2] for r in rows]
    pairs = list(zip(labels, sources))
    size = Counter(pairs)
    weight = np.array([size[p] ** -0.5 for p in pairs])
    for label in (0, 1):
        mask = np.array(labels) == label
        weight[mask] /= 2 * weight[mask].sum()
    return weight


def views(rows, chosen, rng, resolution):
    """Random views of the chosen images -> (float32 [n, 3, r, r], float32 labels [n])."""
    import numpy as np
    import torch
    from distort import random_view
    pixels = [imaging.preprocess(random_view(rows[i][0], rng, resolution), resolution) for i in chosen]
    return torch.from_numpy(np.stack(pixels)), torch.tensor([float(rows[i][1]) for i in chosen])


def kept_auc(model, rows, resolution):
    """AUC of the network's own head on untouched images that it has not seen."""
    import numpy as np
    import torch
    from sklearn.metrics import roc_auc_score
    model.eval()
    with torch.inference_mode():
        pixels = torch.from_numpy(np.stack([imaging.preprocess(r[0], resolution) for r in rows]))
        scores = torch.cat([model(part) for part in pixels.split(64)])[:, 0]
    return roc_auc_score([r[1] for r in rows], scores.numpy())


def clip_state_dict(tower):
    """Vision tower -> a state dict as `clip.load` wants it: fp16, beside a text tower of width 64 that nobody uses."""
    from clip.model import CLIP
    stub = CLIP(tower.output_dim, 32, (1, 1, 1, 1), 2, None, 1, 1, 64, 1, 1).state_dict()
    state = {k: v for k, v in stub.items() if not k.startswith("visual.")}
    state |= {f"visual.{k}": v for k, v in tower.state_dict().items()}
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


def arguments(args):
    """What shapes the weights, besides the images."""
    return {k: v for k, v in vars(args).items() if k not in ("data_dir", "output")}


def save(args, tower, rows):
    """Checkpoint and, beside it, the card: arguments, commit and which images the encoder has seen."""
    import torch
    with common.atomic_write(args.output) as file:
        torch.save(clip_state_dict(tower), file)
    card = {"notice": NOTICE, "precision": PRECISION, "arguments": arguments(args),
            "commit": common.code_commit(), "torch": torch.__version__,
            "images": len(rows), "seen": sorted(r[3][:16] for r in rows)}
    with common.atomic_write(Path(args.output).with_suffix(".json"), "w") as file:
        json.dump(card, file, indent=1)


def main(argv=None):
    args = parse_args(argv)
    require_torch("training an encoder")
    import numpy as np
    import torch
    from clip.model import ModifiedResNet
    from tqdm import tqdm

    torch.manual_seed(args.seed)
    seen, kept = load_images(args)
    common.say(f"{len(seen)} images to learn from, {len(kept)} kept for the classifier")
    arch = ARCHITECTURES[args.arch]
    resolution = arch["input_resolution"]
    model = torch.nn.Sequential(ModifiedResNet(**arch), torch.nn.Linear(arch["output_dim"], 1))
    model = model.to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE),
                                                  use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    weight = balanced_draw(seen)

    # Interrupted trainings go on: state is stored beside the output, and each step draws from its own seed.
    of = common.sha256(repr([sorted(arguments(args).items()), sorted(row[3] for row in seen)]).encode())
    state_file, first = Path(f"{args.output}.state"), 0
    parts = dict(model=model, average=average, optimizer=optimizer, schedule=schedule)
    if state_file.is_file():
        state = torch.load(state_file)
        if state["of"] != of:
            raise UsageError(f"{state_file} is the state of a training with other arguments or images: remove it first")
        first = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        common.say(f"going on from step {first} ({state_file})")

    # No thread makes the next batch ahead: beside torch's own threads it made a step three times as long on two cores.
    progress = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step")
    for step in progress:
        rng = np.random.default_rng([args.seed, step])
        pixels, labels = views(seen, rng.choice(len(seen), args.batch_size, p=weight), rng, resolution)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):  # 1.3 times the speed where the processor has it
            scores = model(pixels.contiguous(memory_format=torch.channels_last))[:, 0]
        target = labels * (1 - SMOOTHING) + SMOOTHING / 2
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores.float(), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # without it a long run fell from AUC 0.77 to 0.70
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            with common.atomic_write(state_file) as file:
                torch.save({"step": step + 1, "of": of, **{k: v.state_dict() for k, v in parts.items()}}, file)
            if kept:
                common.say(f" step {step + 1}: AUC {kept_auc(average.module, kept, resolution):.3f} on kept images")
    save(args, average.module[0].eval(), seen)
    state_file.unlink(missing_ok=True)
    common.say(f"wrote {args.output}; next: python prepare_clip.py --clip_model {args.output}")


if __name__ == "__main__":
    common.run(main)
