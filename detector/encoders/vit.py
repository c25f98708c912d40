"""CLIP's vision transformer from plain arrays, on two engines: OpenVINO, and numpy in float32.

    model = openvino_model(weights, arch, "final")            # for every verdict
    features = numpy_forward(weights, arch, "final", pixels)  # the reference

`Tower` follows clip/model.py (VisionTransformer, ResidualAttentionBlock, QuickGELU).
"""

import numpy as np

EPSILON = 1e-5  # of torch's LayerNorm
QUICK_GELU = 1.702  # x * sigmoid(1.702 x)
SHORTEST = 1e-12  # least divisor of torch's normalize


def openvino_model(weights, arch, layers):
    """{name: array}, architecture, canonical layers -> openvino.Model.

    The model maps float32 [1, 3, r, r] to float32 [1, d]. It can be reshaped to n images. Its
    weights are float32 constants. `openvino.save_model` stores them as fp16.
    """
    import openvino as ov
    from openvino import opset13

    side = arch["input_resolution"]
    pixels = opset13.parameter([1, 3, side, side], np.float32)
    return ov.Model([OpenvinoTower(weights, arch).features(pixels, layers)], [pixels], "clip")


def numpy_forward(weights, arch, layers, pixels):
    """The same computation in numpy: float32 [n, 3, r, r] -> float32 [n, d]."""
    return NumpyTower(weights, arch).features(pixels, layers)


class Tower:
    """The tower in terms of a few operations, which the subclass of an engine defines."""

    def __init__(self, weights, arch):
        self.weights, self.arch = weights, arch
        self.heads, self.depth = arch["heads"], arch["width"] // arch["heads"]

    def weight(self, name):
        return self.weights[name].astype(np.float32)

    def features(self, pixels, layers):
        """Canonical `layers`: 'final', 'penultimate', or blocks, scaled to length 1 and joined."""
        names = layers.split(",")
        depth = max(int(name) if name.isdigit() else self.arch["layers"] for name in names)
        x, tokens = self.norm(self.embed(pixels), "ln_pre"), []
        for number in range(depth - 1):
            x = self.block(x, f"transformer.resblocks.{number}")
            tokens.append(self.class_token(x))
        tokens.append(self.block(x, f"transformer.resblocks.{depth - 1}", last=True))
        if layers in ("final", "penultimate"):
            return self.output(tokens, layers)
        return self.join([self.unit(self.output(tokens, name)) for name in names])

    def output(self, tokens, name):
        if name.isdigit():
            return tokens[int(name) - 1]
        x = self.norm(tokens[-1], "ln_post")
        return self.product(x, "proj") if name == "final" else x

    def block(self, x, name, last=False):
        """[n, tokens, width] -> the same, or of the last block the class token, [n, width].

        No later block attends to the last block's other tokens, so they are not computed.
        """
        inner = self.linear(self.norm(x, f"{name}.ln_1"), f"{name}.attn.in_proj_")
        attended = self.attend(inner)
        if last:
            x, attended = self.class_token(x), self.class_token(attended)
        x = x + self.linear(attended, f"{name}.attn.out_proj.")
        return x + self.perceptron(self.norm(x, f"{name}.ln_2"), f"{name}.mlp")

    def perceptron(self, x, name):
        return self.linear(self.quick_gelu(self.linear(x, f"{name}.c_fc.")), f"{name}.c_proj.")

    def linear(self, x, name):
        return self.product(x, f"{name}weight", transposed=True) + self.weight(f"{name}bias")

    def norm(self, x, name):
        return self.standardise(x) * self.weight(f"{name}.weight") + self.weight(f"{name}.bias")


class NumpyTower(Tower):
    """Computes with float32 arrays."""

    def product(self, x, name, transposed=False):
        weight = self.weight(name)
        return x @ (weight.T if transposed else weight)

    def standardise(self, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(EPSILON))

    def attend(self, x):
        n, tokens, _ = x.shape
        parts = x.reshape(n, tokens, 3, self.heads, self.depth)
        q, k, v = parts.transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) * np.float32(self.depth**-0.5)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        x = scores / scores.sum(-1, keepdims=True) @ v
        return x.transpose(0, 2, 1, 3).reshape(n, tokens, -1)

    def quick_gelu(self, x):
        # the tanh form cannot overflow
        return x * np.float32(0.5) * (1 + np.tanh(np.float32(QUICK_GELU / 2) * x))

    def embed(self, pixels):
        n, patch = len(pixels), self.arch["patch_size"]
        grid = self.arch["input_resolution"] // patch
        patches = pixels.reshape(n, 3, grid, patch, grid, patch).transpose(0, 2, 4, 1, 3, 5)
        kernel = self.weight("conv1.weight").reshape(self.arch["width"], -1)
        x = patches.reshape(n, grid * grid, -1) @ kernel.T
        first = np.broadcast_to(self.weight("class_embedding"), (n, 1, x.shape[2]))
        return np.concatenate([first, x], 1) + self.weight("positional_embedding")

    def class_token(self, x):
        return x[:, 0]

    def unit(self, x):
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(SHORTEST))

    def join(self, parts):
        return np.concatenate(parts, 1)


class OpenvinoTower(Tower):
    """Builds the nodes of an OpenVINO graph.

    All tokens of images pass through linear layers as convolutions of one token. OpenVINO runs
    these 1.2 times as fast as matrix products where there are 197 rows (benchmarks/speed.md). With
    a fixed number of images, the transposes around them only rename axes.
    """

    def __init__(self, weights, arch):
        super().__init__(weights, arch)
        from openvino import opset13

        self.op = opset13

    def integers(self, *values):
        return self.op.constant(np.int64(values))

    def product(self, x, name, transposed=False):
        return self.op.matmul(x, self.op.constant(self.weight(name)), False, transposed)

    def linear(self, x, name):
        if len(x.get_output_partial_shape(0)) == 2:  # class tokens
            return super().linear(x, name)
        return self.turned(self.convolution(self.turned(x), name))

    def perceptron(self, x, name):
        if len(x.get_output_partial_shape(0)) == 2:
            return super().perceptron(x, name)
        inner = self.quick_gelu(self.convolution(self.turned(x), f"{name}.c_fc."))
        return self.turned(self.convolution(inner, f"{name}.c_proj."))

    def turned(self, x):
        """[n, tokens, width] -> [n, width, tokens], and back."""
        return self.op.transpose(x, self.integers(0, 2, 1))

    def convolution(self, x, name):
        kernel = self.op.constant(self.weight(f"{name}weight")[:, :, None])
        bias = self.weight(f"{name}bias")[:, None]
        return self.op.convolution(x, kernel, [1], [0], [0], [1]) + bias

    def standardise(self, x):
        return self.op.mvn(x, self.integers(-1), True, EPSILON, "inside_sqrt")

    def attend(self, x):
        x = self.op.reshape(x, self.integers(0, 0, 3, self.heads, self.depth), True)
        x = self.op.transpose(x, self.integers(2, 0, 3, 1, 4))
        q, k, v = (
            self.op.gather(x, self.op.constant(part), self.op.constant(0)) for part in range(3)
        )
        x = self.op.transpose(
            self.op.scaled_dot_product_attention(q, k, v), self.integers(0, 2, 1, 3)
        )
        return self.op.reshape(x, self.integers(0, 0, -1), True)

    def quick_gelu(self, x):
        return self.op.swish(x, self.op.constant(np.float32(QUICK_GELU)))

    def embed(self, pixels):
        patch, width = self.arch["patch_size"], self.arch["width"]
        kernel = self.op.constant(self.weight("conv1.weight"))
        x = self.op.convolution(pixels, kernel, [patch] * 2, [0, 0], [0, 0], [1, 1])
        x = self.op.reshape(x, self.integers(0, width, -1), True)
        x = self.op.transpose(x, self.integers(0, 2, 1))
        batch = self.op.gather(self.op.shape_of(x), self.integers(0), self.op.constant(0))
        shape = self.op.concat([batch, self.integers(1, width)], 0)
        first = self.op.broadcast(self.op.constant(self.weight("class_embedding")), shape)
        return self.op.concat([first, x], 1) + self.weight("positional_embedding")

    def class_token(self, x):
        return self.op.gather(x, self.op.constant(0), self.op.constant(1))

    def unit(self, x):
        length = self.op.sqrt(self.op.reduce_sum(x * x, self.integers(1), True))
        return x / self.op.maximum(length, self.op.constant(np.float32(SHORTEST)))

    def join(self, parts):
        return self.op.concat(parts, 1)
