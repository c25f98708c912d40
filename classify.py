"""Image -> real or fake, with a calibrated confidence.

    python classify.py --image_path photo.jpg --model_path model.joblib
    python classify.py --image_path folder/ --json
    cat photo.jpg | python classify.py --image_path -
"""
import argparse
import json
import os
import sys
from pathlib import Path

import catalogue
import common
import encoders
from common import EncoderError, ImageError, UsageError, say

SHIPPED_MODEL = common.HERE / "models" / "baseline.joblib"


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image_path", required=True, nargs="+", metavar="IMG",
                        help="images, folders, or - for the bytes of one on stdin")
    parser.add_argument("--model_path", metavar="FILE",
                        help="from train_model.py (default: model.joblib where there is one, else the shipped baseline)")
    parser.add_argument("--json", action="store_true", help="print JSON; of several images one object a line, with the path")
    parser.add_argument("--details", action="store_true",
                        help="also the probability of fake, the threshold, whether it is uncertain, which model said so, "
                             "and what the file says of its own making")
    parser.add_argument("--max_pixels", type=int, default=common.MAX_PIXELS, metavar="N",
                        help="largest image taken (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                        help="where to encode (default: %(default)s)")
    return parser.parse_args(argv)


class Detector:
    """A model and the encoder it was trained on: bytes of an image -> verdict.

    detector = Detector("model.joblib")
    detector.classify(data)          # ('real', 0.95)

    The encoder is found in the cache by the identity that the model names; CLIP_MODEL plays no part. `model` and `encoder`:
    loaded already. Raises ModelError, EncoderError.
    """

    def __init__(self, model_path, device="auto", threads=0, model=None, encoder=None):
        from model import load_model
        self.model = model or load_model(model_path)
        self.crops = self.model.get("crops", 0)
        self.encoder = encoder or encoders.Encoder(encoder_folder(self.model["encoder"], model_path), device, threads=threads)

    def pixels(self, image):
        """PIL RGB image -> float32 [3, r, r], as the encoder takes it; [1 + crops, 3, r, r] for a model that looks at crops."""
        from imaging import in_pieces, normalise
        pieces = normalise(in_pieces(image, self.encoder.resolution, self.crops))
        return pieces if self.crops else pieces[0]

    def p_fake(self, pixels):
        """`pixels` of n images, float32 [n, ...] -> calibrated probability of fake, float64 [n]."""
        from model import decision, probability
        features = self.encoder.encode(pixels.reshape(-1, *pixels.shape[-3:])).reshape(*pixels.shape[:-3], -1)
        return probability(self.model, decision(self.model, features))

    def classify(self, data, max_pixels=common.MAX_PIXELS):
        """Image bytes -> (classification, confidence). Raises ImageError's kinds."""
        from imaging import decode_image
        from model import verdict
        return verdict(self.model, self.p_fake(self.pixels(decode_image(data, max_pixels))[None])[0])


def encoder_folder(encoder, model_path, prepare=True):
    """The prepared folder that a model's encoder entry names; one that has a name of its own is prepared where it is missing,
    unless a service asks: the memory that takes would stay in its process. Raises EncoderError."""
    folder, clip_model = encoders.find_encoder(identity=encoder["identity"]), encoders.clip_model_of(encoder)
    if folder is None and prepare and clip_model in catalogue.NAMES:
        from prepare_clip import ensure_encoder
        ensure_encoder(clip_model, layers=encoder["layers"])
        folder = encoders.find_encoder(identity=encoder["identity"])
    if folder is None:
        checkpoint = clip_model if clip_model in catalogue.NAMES else "with its checkpoint"
        if encoder["layers"] != "final":
            checkpoint += f" --layers {encoder['layers']}"
        raise EncoderError(f"{model_path} was trained on encoder '{encoder['name']}' ({encoder['identity'][:12]}), which is "
                           f"not in {encoders.cache_dir()}: run python prepare_clip.py --clip_model {checkpoint}")
    return folder


def choose_model(model_path):
    """The given path, else model.joblib, else the shipped baseline; says which where it was not given."""
    if model_path is None:
        model_path = "model.joblib" if Path("model.joblib").is_file() else SHIPPED_MODEL
        say(f"model: {'the shipped baseline' if model_path is SHIPPED_MODEL else model_path}")
    if not Path(model_path).is_file():
        raise UsageError(f"--model_path {model_path}: no such file; make it with train_model.py")
    return model_path


def list_paths(given):
    """Arguments of --image_path -> (list of files, was a folder unreadable?). Folders give all their files, sorted; '-' stays as
    it is. Raises UsageError."""
    paths, unreadable = [], False
    for path in given:
        if path != "-" and Path(path).is_dir():
            from dataset import list_files, say_left_out
            listing = list_files(path)
            say_left_out(path, listing)
            if not listing.files:
                raise UsageError(f"--image_path {path}: the folder {'cannot be read' if listing.unreadable else 'holds no images' if any(listing) else 'is empty'}")
            paths += [os.path.join(path, name) for name in listing.files]
            unreadable = unreadable or bool(listing.unreadable)
        elif path != "-" and not Path(path).exists():
            raise UsageError(f"--image_path {path}: no such file")
        else:
            paths.append(path)
    return paths, unreadable


def load(detector, path, max_pixels, details=False):
    """One file -> (the encoder's input, with `details` what the file says of its making), or the error that says why not."""
    from imaging import load_rgb, open_image
    try:
        data = sys.stdin.buffer.read() if path == "-" else common.read_bytes(path)
        image = open_image(data, max_pixels)
        pixels = detector.pixels(load_rgb(image))
        if not details:
            return pixels, None
        from provenance import read_provenance
        return pixels, read_provenance(image, data)
    except (ImageError, UsageError) as error:
        return error


def classify_all(detector, paths, max_pixels, batch=8, details=False):
    """Yield (path, (probability of fake, with `details` what the file says of its making) or the error), in order; the next
    batch is decoded while one is encoded."""
    import numpy as np
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        chunks = [paths[i:i + batch] for i in range(0, len(paths), batch)]
        ahead = None
        for chunk, following in zip(chunks, [*chunks[1:], []]):
            waiting = ahead or [pool.submit(load, detector, path, max_pixels, details) for path in chunk]
            loaded = [future.result() for future in waiting]
            ahead = [pool.submit(load, detector, path, max_pixels, details) for path in following]
            good = [found[0] for found in loaded if not isinstance(found, Exception)]
            answers = iter(detector.p_fake(np.stack(good)) if good else ())
            for path, found in zip(chunk, loaded):
                yield path, found if isinstance(found, Exception) else (next(answers), found[1])


def answer(classification, confidence):
    """The documented JSON, exactly these keys."""
    return {"classification": classification, "confidence": confidence}


def details(model, p_fake, provenance):
    """What stands behind a verdict, and beside it what the file says of its making, which plays no part in it. Never part of
    the documented JSON unless it is asked for."""
    from model import outside
    uncertain, (low, high) = not bool(outside(p_fake, model["band"])), model["band"]
    reason = f"the probability of fake lies between {low:.2f} and {high:.2f}, where too many training images are on either side"
    found = {"p_fake": round(float(p_fake), 4), "threshold": round(model["threshold"], 4), "uncertain": uncertain,
             "reason": reason if uncertain else None, "model_version": model["versions"]["model"]}
    notice = {"notice": model["notice"]} if "notice" in model else {}
    return {**found, **notice, "provenance": provenance}


def line(model, p_fake, provenance, args, path=None):
    """One verdict as it is printed: text, or JSON with --json; `path` where several images are asked about."""
    from model import verdict
    classification, confidence = verdict(model, p_fake)
    more = details(model, p_fake, provenance) if args.details else {}
    if args.json:
        return json.dumps({**({} if path is None else {"path": path}), **answer(classification, confidence), **more})
    if more:
        from provenance import in_words
        more["provenance"] = in_words(provenance)
    text = f"{classification} (confidence {confidence:.2f})" + "".join(f"; {k} {v}" for k, v in more.items() if v is not None)
    return common.printable(text if path is None else f"{path}: {text}")


def main(argv=None):
    args = parse_args(argv)
    single = len(args.image_path) == 1 and not Path(args.image_path[0]).is_dir()
    paths, unreadable = list_paths(args.image_path)
    detector = Detector(choose_model(args.model_path), args.device)
    if "notice" in detector.model:
        say(f"note: {detector.model['notice']}")
    if single:
        found = load(detector, paths[0], args.max_pixels, args.details)
        if isinstance(found, Exception):
            say(f"error: {paths[0]}: {found}")
            return 1
        pixels, provenance = found
        print(line(detector.model, detector.p_fake(pixels[None])[0], provenance, args))
        return 0

    from tqdm import tqdm
    bad = 0
    answers = classify_all(detector, paths, args.max_pixels, details=args.details)
    for path, result in tqdm(answers, total=len(paths), unit="image", disable=None):
        if isinstance(result, Exception):
            bad += 1
            tqdm.write(common.printable(f"{path}: error: {result}"), file=sys.stderr)
            if args.json:
                tqdm.write(json.dumps({"path": path, "error": str(result)}))
        else:
            tqdm.write(line(detector.model, *result, args, path))
    if bad:
        say(f"{bad} of {len(paths)} images could not be read")
    return 1 if bad or unreadable else 0


if __name__ == "__main__":
    common.run(main)
