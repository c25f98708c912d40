"""A full-size ViT-L/14 checkpoint with random weights, as a TorchScript archive like OpenAI's.

    python -m benchmarks.random_clip --output vit-l-14.pt
    CLIP_MODEL=vit-l-14.pt python extract_features.py --data_dir data --output_file random.npz
    python train_model.py --features_file random.npz --model_output_path random.joblib

Speed and memory do not depend on the weights. A model trained on them knows nothing. Needs torch
and clip.
"""

import argparse

import clip.model
import torch

from tests.small_clip import rounded, save_archive


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="checkpoint to write (0.6 GB)"
    )
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    tower = clip.model.VisionTransformer(224, 14, 1024, 24, 16, 768)
    with torch.no_grad():
        for weight in tower.transformer.parameters():
            if weight.ndim > 1:  # torch's own scale gives all images nearly the same features
                weight.mul_(1.5)
    save_archive(rounded(tower), args.output)


if __name__ == "__main__":
    main()
