"""CLIP's vision transformer from plain arrays: as an OpenVINO graph, and in numpy.

    model = openvino_model(weights, arch, "final")            # for every verdict
    features = numpy_forward(weights, arch, "final", pixels)  # what it is compared with

Both follow clip/model.py (VisionTransformer, QuickGELU). They are written twice on purpose: the
numpy form is the record with which a service compares OpenVINO's at its start.
"""
import numpy as np

EPSILON = 1e-5      # of torch's LayerNorm
QUICK_GELU = 1.702  # x * sigmoid(1.702 x)


def block_names(arch, name):
    return [f"transformer.resblocks.{i}.{name}" for i in range(arch["layers"])]


def parts_of(layers):
    """Canonical `layers` -> names of what is joined, [] for a single output."""
    return [] if layers in ("final", "penultimate") else layers.split(",")


# ---- OpenVINO ----

def openvino_model(weights, arch, layers):
    """{name: array}, architecture, canonical layers -> openvino.Model: float32 [n, 3, r, r] -> [n, d].

    Weights are float32 constants; `openvino.save_model` stores them as fp16.
    """
    import openvino as ov
    from openvino import opset13 as op

    def constant(name):
        return op.constant(weights[name].astype(np.float32))

    def integers(*values):
        return op.constant(np.int64(values))

    def norm(x, name):
        x = op.mvn(x, integers(-1), True, EPSILON, "inside_sqrt")
        return op.add(op.multiply(x, constant(f"{name}.weight")), constant(f"{name}.bias"))

    def linear(x, weight, bias):
        return op.add(op.matmul(x, constant(weight), False, True), constant(bias))

    def attention(x, name):
        heads, depth = arch["heads"], arch["width"] // arch["heads"]
        joined = linear(x, f"{name}.in_proj_weight", f"{name}.in_proj_bias")
        joined = op.reshape(joined, integers(0, 0, 3, heads, depth), True)
        joined = op.transpose(joined, integers(2, 0, 3, 1, 4))
        q, k, v = (op.gather(joined, op.constant(i), op.constant(0)) for i in range(3))
        x = op.scaled_dot_product_attention(q, k, v)
        x = op.reshape(op.transpose(x, integers(0, 2, 1, 3)), integers(0, 0, -1), True)
        return linear(x, f"{name}.out_proj.weight", f"{name}.out_proj.bias")

    def block(x, name):
        x = op.add(x, attention(norm(x, f"{name}.ln_1"), f"{name}.attn"))
        inner = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc.weight", f"{name}.mlp.c_fc.bias")
        inner = op.swish(inner, op.constant(np.float32(QUICK_GELU)))
        return op.add(x, linear(inner, f"{name}.mlp.c_proj.weight", f"{name}.mlp.c_proj.bias"))

    def class_token(x):
        return op.gather(x, op.constant(0), op.constant(1))

    def output(name):
        if name.isdigit():
            return class_token(outputs[int(name) - 1])
        x = norm(class_token(outputs[-1]), "ln_post")
        return op.matmul(x, constant("proj"), False, False) if name == "final" else x

    def unit(x):
        length = op.sqrt(op.reduce_sum(op.multiply(x, x), integers(1), True))
        return op.divide(x, op.maximum(length, op.constant(np.float32(1e-12))))

    side, patch, width = arch["input_resolution"], arch["patch_size"], arch["width"]
    pixels = op.parameter([-1, 3, side, side], np.float32)
    x = op.convolution(pixels, constant("conv1.weight"), [patch] * 2, [0, 0], [0, 0], [1, 1])
    x = op.transpose(op.reshape(x, integers(0, width, -1), True), integers(0, 2, 1))
    batch = op.gather(op.shape_of(x), integers(0), op.constant(0))
    first = op.broadcast(constant("class_embedding"), op.concat([batch, integers(1, width)], 0))
    x = op.add(op.concat([first, x], 1), constant("positional_embedding"))
    x, outputs = norm(x, "ln_pre"), []
    for i in range(arch["layers"]):
        x = block(x, f"transformer.resblocks.{i}")
        outputs.append(x)
    names = parts_of(layers)
    x = op.concat([unit(output(name)) for name in names], 1) if names else output(layers)
    return ov.Model([x], [pixels], "clip")


# ---- numpy ----

def numpy_forward(weights, arch, layers, pixels):
    """The same in numpy: float32 [n, 3, r, r] -> float32 [n, d]."""
    def linear(x, weight, bias):
        return x @ weights[weight].astype(np.float32).T + weights[bias].astype(np.float32)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
        return x * weights[f"{name}.weight"].astype(np.float32) + weights[f"{name}.bias"].astype(np.float32)

    def attention(x, name):
        n, tokens, width = x.shape
        heads = arch["heads"]
        x = linear(x, f"{name}.in_proj_weight", f"{name}.in_proj_bias")
        q, k, v = x.reshape(n, tokens, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) * np.float32((width // heads) ** -0.5)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        x = scores / scores.sum(-1, keepdims=True) @ v
        x = x.transpose(0, 2, 1, 3).reshape(n, tokens, width)
        return linear(x, f"{name}.out_proj.weight", f"{name}.out_proj.bias")

    def block(x, name):
        x = x + attention(norm(x, f"{name}.ln_1"), f"{name}.attn")
        inner = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc.weight", f"{name}.mlp.c_fc.bias")
        inner *= 0.5 * (1 + np.tanh(np.float32(QUICK_GELU / 2) * inner))  # no overflow
        return x + linear(inner, f"{name}.mlp.c_proj.weight", f"{name}.mlp.c_proj.bias")

    def output(name):
        if name.isdigit():
            return outputs[int(name) - 1]
        x = norm(outputs[-1], "ln_post")
        return x @ weights["proj"].astype(np.float32) if name == "final" else x

    def unit(x):
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    n, patch, width = len(pixels), arch["patch_size"], arch["width"]
    grid = arch["input_resolution"] // patch
    patches = pixels.reshape(n, 3, grid, patch, grid, patch).transpose(0, 2, 4, 1, 3, 5)
    kernel = weights["conv1.weight"].astype(np.float32).reshape(width, -1)
    x = patches.reshape(n, grid * grid, -1) @ kernel.T
    first = np.broadcast_to(weights["class_embedding"].astype(np.float32), (n, 1, width))
    x = np.concatenate([first, x], 1) + weights["positional_embedding"].astype(np.float32)
    x, outputs = norm(x, "ln_pre"), []
    for i in range(arch["layers"]):
        x = block(x, f"transformer.resblocks.{i}")
        outputs.append(x[:, 0])
    names = parts_of(layers)
    return np.concatenate([unit(output(name)) for name in names], 1) if names else output(layers)
