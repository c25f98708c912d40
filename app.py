"""The HTTP service around `Detector`: POST /classify with a multipart field `image`.

    MODEL_PATH=model.joblib python app.py
    curl -F image=@photo.jpg http://127.0.0.1:8000/classify
    MODEL_PATH=model.joblib gunicorn 'app:create_app()'       # the same; gunicorn.conf.py is read

Settings come from environment variables: python app.py --help lists them.
"""
import argparse
import io
import logging
import os
import sys
import threading
import time
from pathlib import Path

from flask import Flask, Request, jsonify, request
from werkzeug.exceptions import HTTPException

import common
import encoders
from common import DetectorError, ImageError, UsageError

log = logging.getLogger("app")

# name: (default, what it is); the README's table is held against this one by a test
SETTINGS = {
    "MODEL_PATH": ("", "model file from train_model.py; required"),
    "ALLOW_DEMO_MODEL": ("0", "1 serves a model on the demonstration encoder `tiny`"),
    "MAX_UPLOAD_BYTES": ("10485760", "largest request body; beyond it 413"),
    "MAX_PIXELS": ("50000000", "largest image, counted from its header before decoding; beyond it 413"),
    "THREADS": ("0", "processor threads of one forward pass; 0: all"),
    "HTTP_THREADS": ("8", "requests handled at a time"),
    "HOST": ("127.0.0.1", "address to listen on"),
    "PORT": ("8000", "port to listen on"),
}


def read_settings(given=None):
    """Environment, and `given` over it -> {name: str or int}. Raises UsageError that names a bad value."""
    values = {name: (given or {}).get(name, os.environ.get(name) or default) for name, (default, _) in SETTINGS.items()}
    for name, (default, _) in SETTINGS.items():
        if default.isdigit():
            if not str(values[name]).isdecimal():
                raise UsageError(f"{name}={values[name]}: must be a whole number")
            values[name] = int(values[name])
    if values["PORT"] > 65535:
        raise UsageError(f"PORT={values['PORT']}: must be at most 65535")
    if not values["HTTP_THREADS"]:
        raise UsageError("HTTP_THREADS=0: must be at least 1")
    return values


def check(settings):
    """Everything that can be known before serving, in one line: raises DetectorError. Cheap, and without OpenVINO."""
    from classify import encoder_folder
    from model import load_model
    path = settings["MODEL_PATH"]
    if not path:
        raise UsageError("MODEL_PATH is not set: name a model file from train_model.py (models/baseline.joblib is a demonstration)")
    if not Path(path).is_file():
        raise UsageError(f"MODEL_PATH={path}: no such file; make it with train_model.py")
    folder = encoder_folder(load_model(path)["encoder"], path)
    notice = encoders.read_manifest(folder).get("notice")
    if notice and not settings["ALLOW_DEMO_MODEL"]:
        raise UsageError(f"MODEL_PATH={path}: {notice}; set ALLOW_DEMO_MODEL=1 to serve it all the same")


class MemoryRequest(Request):
    """Form parts stay in memory: no image is ever written to disk."""

    def _get_file_stream(self, total_content_length, content_type, filename=None, content_length=None):
        return io.BytesIO()


def create_app(config=None):
    """Flask app; `config` overrides settings by name. The model loads in the background; /readyz says when.

    Raises DetectorError where a setting or the model is unusable: it never falls back to another model.
    """
    settings = read_settings(config)
    check(settings)
    app = Flask(__name__, static_folder=None)
    app.request_class = MemoryRequest
    app.config["MAX_CONTENT_LENGTH"] = app.config["MAX_FORM_MEMORY_SIZE"] = settings["MAX_UPLOAD_BYTES"]
    app.json.sort_keys = False
    state = app.extensions["detector"] = {"detector": None, "error": None}
    threading.Thread(target=load_detector, args=(state, settings), daemon=True).start()

    @app.get("/healthz")
    def healthz():
        """The process answers. Never touches the model."""
        return {"status": "ok"}

    @app.get("/readyz")
    def readyz():
        """200 once verdicts can be given."""
        if state["detector"] is None:
            return error(503, state["error"] or "the model is still loading")
        return {"status": "ready"}

    @app.post("/classify")
    def classify():
        """One multipart field `image` -> {"classification": "real", "confidence": 0.95}."""
        from classify import answer
        detector = state["detector"]
        if detector is None:
            return error(503, state["error"] or "the model is still loading")
        files = request.files.getlist("image")
        if len(files) != 1:
            return error(400, f"expected one file in the multipart field 'image', got {len(files)}")
        response = jsonify(answer(*detector.classify(files[0].read(), settings["MAX_PIXELS"])))
        if detector.encoder.notice:
            response.headers["X-Model-Notice"] = detector.encoder.notice
        return response

    app.register_error_handler(ImageError, lambda e: error(e.status, str(e)))
    app.register_error_handler(HTTPException, lambda e: http_error(e, settings))
    app.register_error_handler(Exception, unexpected)
    return app


def error(status, message):
    """The one shape of every error: {"error": message}."""
    response = jsonify({"error": message})
    response.status_code = status
    return response


def http_error(exception, settings):
    """What Flask itself refuses, in our shape and with its headers (a 405 must say what is allowed)."""
    message = f"{exception.name}: {exception.description}"
    if exception.code == 413:
        message = f"the request is larger than the {settings['MAX_UPLOAD_BYTES']:,} bytes allowed"
    response = error(exception.code, message)
    response.headers.extend((k, v) for k, v in exception.get_headers() if k != "Content-Type")
    return response


def unexpected(exception):
    """Our bug: a traceback for the log, one word for the client."""
    log.exception("unexpected error")
    return error(500, "internal error")


def load_detector(state, settings):
    """Load model and encoder, run one forward pass to warm it, then be ready."""
    from classify import Detector
    started = time.monotonic()
    try:
        detector = Detector(settings["MODEL_PATH"], threads=settings["THREADS"])
        detector.p_fake(detector.pixels(common.Image.new("RGB", (640, 480)))[None])
        state["detector"] = detector
        log.info("ready after %.1f s: model %s on '%s', %s", time.monotonic() - started,
                 detector.model["versions"]["model"], detector.encoder.name, detector.encoder.precision)
        if detector.encoder.notice:
            log.warning("%s", detector.encoder.notice)
    except Exception as exception:
        state["error"] = f"the model cannot be loaded: {exception}"
        log.error("%s", state["error"], exc_info=not isinstance(exception, DetectorError))


def main(argv=None):
    width = max(map(len, SETTINGS))
    lines = [f"  {name:{width}}  {text}" + (f" (default: {default})" if default else "")
             for name, (default, text) in SETTINGS.items()]
    argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="environment variables:\n" + "\n".join(lines),
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    if os.environ.get("MODEL_PATH"):
        os.environ["MODEL_PATH"] = os.path.abspath(os.environ["MODEL_PATH"])
    os.chdir(common.HERE)  # gunicorn looks for its settings and the app here
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", "app:create_app()"])


if __name__ == "__main__":
    common.run(main)
