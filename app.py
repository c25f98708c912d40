"""The HTTP service around `Detector`: POST /classify with a multipart field `image`.

    MODEL_PATH=model.joblib python app.py
    curl -F image=@photo.jpg http://127.0.0.1:8000/classify
    MODEL_PATH=model.joblib gunicorn 'app:create_app()'   # the same; reads gunicorn.conf.py

Settings are environment variables. `python app.py --help` lists them.
"""

import argparse
import os
import sys

from detector.base.console import run
from detector.base.project import HERE
from detector.service.settings import SETTINGS

PATHS = ("MODEL_PATH", "MODEL_SHA256_FILE", "MODEL_PUBLIC_KEY", "API_KEYS_FILE", "CLIP_CACHE")


def main(argv=None):
    argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="environment variables:\n" + "\n".join(help_lines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    for name in PATHS:
        if os.environ.get(name):
            os.environ[name] = os.path.abspath(os.environ[name])
    os.chdir(HERE)  # gunicorn looks for its settings and the app here
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", "app:create_app()"])


def help_lines():
    """Yield a line for each setting: its name, its meaning and its default."""
    width = max(map(len, SETTINGS))
    for name, (default, text) in SETTINGS.items():
        yield f"  {name:{width}}  {text}" + (f" (default: {default})" if default else "")


def create_app(config=None):
    """The Flask app, for gunicorn (detector.service.app.create_app)."""
    from detector.service.app import create_app

    return create_app(config)


if __name__ == "__main__":
    run(main)
