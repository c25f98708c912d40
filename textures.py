"""The encoder `tiny`: a picture -> statistics of its colours, contrasts and residuals. Fixed filters: nothing in it is learnt.

    python textures.py --output_dir runs/tiny       # the prepared encoder, as prepare_clip.py writes one; part of `make tiny`
"""
import argparse
import itertools
import json
import warnings
from pathlib import Path

import common
from encoders import PREPROCESSING
from prepare_clip import golden_features, require_torch

NOTICE = "this encoder is a demonstration, statistics of colours and textures in the place of CLIP: not a detector to rely on"
SIDE = 160
LUMA = (0.299, 0.587, 0.114)
STEPS = (2, 1, 1, 2, 2, 2)     # of residuals in luma, R - G, (R + G) / 2 - B, and in R, G and B; of 255
NOISE = 1e-3                   # variance that is added to all: a flat picture is no special case


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=common.Help)
    parser.add_argument("--output_dir", default="runs/tiny", metavar="DIR", help="folder to write")
    args = parser.parse_args(argv)
    common.check_folder(args.output_dir, f"--output_dir {args.output_dir}")
    return args


if __name__ == "__main__":  # --help and wrong flags are answered now, before what takes a second to import
    common.answered(parse_args)
    common.answered(lambda _: require_torch("writing the encoder"))

import torch  # noqa: E402
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, relu  # noqa: E402

import imaging  # noqa: E402


def root(shares):
    """Square roots, as histograms are best compared (Hellinger); a little is added, since at 0 a rounding would become large."""
    return (shares + 1e-5).sqrt()


def soft(x, low, high, bins):
    """[..., p] -> [..., bins, p]: how much each value belongs to each of `bins` centres from `low` to `high`, whose ends are open.
    A value between two counts for both: no rounding decides."""
    step = (high - low) / (bins - 1)
    centres = torch.linspace(low, high, bins).unsqueeze(1)
    return relu(1 - (x.clamp(low, high).unsqueeze(-2) - centres).abs() / step)


def triples(a, b, c):
    """Three [..., 3, p], shares of minus, none and plus -> [..., 27]: shares of their triples."""
    ab = (a.unsqueeze(-2) * b.unsqueeze(-3)).flatten(-3, -2)
    return (ab @ c.transpose(-1, -2)).flatten(-2) / a.shape[-1]


def kinds(alike):
    """[27, k]: which of k kinds a triple of minus, none and plus is; `alike`: a triple of (-1, 0, 1) -> all of its kind."""
    kind = [min(alike(triple)) for triple in itertools.product((-1, 0, 1), repeat=3)]
    return torch.tensor([[float(own == other) for other in sorted(set(kind))] for own in kind])


def negated(triple):
    return tuple(-value for value in triple)


def moments(x):
    """[n, h, w] -> [n, 4]: mean, log of the standard deviation, skewness and log of the kurtosis."""
    x = x.flatten(1)
    mean = x.mean(1)
    square = (x - mean.unsqueeze(1)) ** 2
    var, third, fourth = square.mean(1) + NOISE, (square * (x - mean.unsqueeze(1))).mean(1), (square * square).mean(1) + NOISE ** 2
    return torch.stack([mean, var.log() / 2, (third / var ** 1.5).clamp(-10, 10), (fourth / var ** 2).log()], 1)


def along(x):
    """[n, k, h, w] -> [n, k, h - 1, w]: differences of neighbours."""
    return x[:, :, 1:] - x[:, :, :-1]


def turned(x):
    return x.transpose(2, 3)


class Textures(torch.nn.Module):
    """float32 [n, 3, 160, 160] (from imaging.preprocess) -> float32 [n, 445]

    A residual is what is left of a value when its neighbours are taken away: a first or second difference, or a second difference of
    second differences across (Ker and Boehme's kernel). How often which three stand in a row is what steganalysis tells a touched picture
    from an untouched one by (Pevny, Bas, Fridrich: Steganalysis by subtractive pixel adjacency matrix, 2010;
    Fridrich, Kodovsky: Rich models for steganalysis, 2012).
    """

    arch = {"kind": "Textures", "version": 1, "layers": 1}  # the version is another for any other feature

    def __init__(self):
        super().__init__()
        constants = {
            "mean": torch.from_numpy(imaging.MEAN).reshape(3, 1, 1) * 255, "std": torch.from_numpy(imaging.STD).reshape(3, 1, 1) * 255,
            "luma": torch.tensor(LUMA).reshape(3, 1, 1), "steps": torch.tensor(STEPS).reshape(6, 1, 1),
            "in_a_row": kinds(lambda t: {t, t[::-1], negated(t), negated(t[::-1])}), "across": kinds(lambda t: {t, negated(t)})}
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, pixels):
        rgb = avg_pool2d(pixels * self.std + self.mean, 2)
        r, g, b = rgb.split(1, 1)
        planes = torch.cat([(rgb * self.luma).sum(1, keepdim=True), r - g, (r + g) / 2 - b, rgb], 1)
        found = self.colours(planes[:, :3], rgb)
        for scaled in planes, avg_pool2d(planes, 2):  # at 80 and 40 pixels
            found += [self.contrast(scaled[:, 0]), *self.residuals(scaled / self.steps)]
        return torch.cat(found, 1)

    def colours(self, planes, rgb):
        """Two [n, 3, 80, 80] -> list of [n, k], 173 in all: histograms of luma and saturation, the joint one of both differences, mean and
        variance in 4 x 4 cells."""
        y, rg, yb = planes.flatten(2).unbind(1)
        high = rgb.amax(1).flatten(1)
        saturation = (high - rgb.amin(1).flatten(1)) / (high + 8)
        both = soft(rg, -60, 60, 7) @ soft(yb, -60, 60, 7).transpose(1, 2) / y.shape[1]
        mean = adaptive_avg_pool2d(planes, 4)
        spread = adaptive_avg_pool2d((planes - mean.repeat_interleave(20, 2).repeat_interleave(20, 3)) ** 2, 4)
        return [root(soft(y, 0, 255, 16).mean(2)), root(soft(saturation, 0, 1, 12).mean(2)), root(both.flatten(1)), mean.flatten(1),
                (spread + 1).log().flatten(1)]

    def contrast(self, y):
        """[n, h, w] -> [n, 4]: how the logarithm of the variance in windows of 5 x 5 is spread."""
        return moments(torch.log1p(relu(avg_pool2d(y * y, 5, 1) - avg_pool2d(y, 5, 1) ** 2)))

    def residuals(self, planes):
        """[n, 6, h, h] -> [n, 90] and [n, 42]: three in a row of luma and the differences, rows and columns alike; red, green and blue
        at one place."""
        x = torch.cat([planes[:, :3], turned(planes[:, :3]), planes[:, 3:], turned(planes[:, 3:])], 1)
        first = along(x)
        second = along(first)
        crossed = turned(along(along(turned(second)))) / 2
        residuals = torch.stack([first[:, :, 1:, 1:-1], second[..., 1:-1], crossed], 1)  # [n, 3, 12, h - 2, w - 2]
        signs = soft(residuals.flatten(3), -1, 1, 3).unflatten(4, residuals.shape[3:])   # [n, 3, 12, 3, h - 2, w - 2]
        of_row, of_rgb = signs[:, :, :6], signs[:, :, 6:].flatten(4).unflatten(2, (2, 3))
        row = triples(*(of_row[..., i:of_row.shape[4] - 2 + i, :].flatten(4) for i in range(3))) @ self.in_a_row
        across = triples(*of_rgb.unbind(3)) @ self.across
        return [root((row[:, :, :3] + row[:, :, 3:]) / 2).flatten(1), root(across.mean(2)).flatten(1)]


def main(argv=None):
    args = parse_args(argv)
    import openvino as ov  # after encoders.py, which keeps it from phoning home
    folder, tower = Path(args.output_dir), Textures().eval()
    identity = common.sha256(f"{tower.arch} {SIDE} {LUMA} {STEPS} {NOISE} preprocessing={PREPROCESSING}".encode())
    manifest = {"name": "tiny", "notice": NOTICE, "precision": "float32", "float32_alone": True, "commit": common.code_commit(),
                "source": f"textures:{identity}", "identity": identity, "layers": "final", "preprocessing": PREPROCESSING,
                "resolution": SIDE, "arch": tower.arch}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's tracer is deprecated; it is what OpenVINO takes
        # one picture at a time: OpenVINO runs many small operations four times as fast when it knows all sizes
        model = ov.convert_model(tower, example_input=torch.zeros(1, 3, SIDE, SIDE), input=[1, 3, SIDE, SIDE])
    golden = golden_features(tower, SIDE)
    ov.save_model(model, folder / "encoder.xml", compress_to_fp16=False)
    (folder / "encoder.json").write_text(json.dumps({**manifest, "dim": len(golden), "golden": golden}, indent=1))
    print(folder)


if __name__ == "__main__":
    common.run(main)
