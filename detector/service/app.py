"""The Flask app: routes, errors, and the log line of each request."""

import difflib
import json
import re
import secrets
import time
from pathlib import Path

from flask import Blueprint, Flask, Response, current_app, g, jsonify, render_template, request
from gunicorn.http.errors import ParseException
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from werkzeug.exceptions import ClientDisconnected, HTTPException

from detector.base.constants import CLASSES
from detector.base.errors import ImageError
from detector.images import formats
from detector.images.occlusion import MEANING, PASSES
from detector.model.file import golden_floor
from detector.service.engine import Busy, Engine, named
from detector.service.front import (
    add_headers,
    allow_origins,
    busy_response,
    drain,
    error_response,
    id_of,
    turn_away,
    under_prefix,
)
from detector.service.settings import key_name, read_settings
from detector.service.telemetry import Telemetry, say_event
from detector.service.upload import Refused, read_images
from detector.verdict import answer, details

FEEDBACK_BYTES = 2000  # a megabyte of JSON takes 30 MB once parsed
OPEN = ("/", "/healthz", "/readyz", "/metrics", "/openapi.json")  # without a key
PROBES = ("/healthz", "/readyz", "/metrics")  # frequent, so they are logged only when they fail
FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
FEEDBACK_ID = re.compile(r"[A-Za-z0-9._-]{1,72}")  # an image of a batch adds its number
DOCUMENT = json.loads(Path(__file__).with_name("openapi.json").read_text())
PAGE_POLICY = (
    "default-src 'none'; style-src 'nonce-{0}'; script-src 'nonce-{0}'; img-src blob: data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

routes = Blueprint("service", __name__)


# ---- the app ----


def create_app(config=None):
    """Flask app; `config` overrides settings by name.

    The model loads in the background, and /readyz says when it is ready. With a broken model the
    app is alive and not ready, and tries again on SIGHUP. It never falls back to another model.
    Raises UsageError where a setting is unusable.
    """
    settings = read_settings(config)
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings["MAX_UPLOAD_BYTES"]
    app.json.sort_keys = False
    app.register_blueprint(routes)
    telemetry = Telemetry()
    app.extensions.update(engine=Engine(settings, telemetry), telemetry=telemetry)
    app.wsgi_app = turn_away(app)
    app.wsgi_app = allow_origins(app.wsgi_app, settings["CORS_ORIGINS"])
    app.wsgi_app = under_prefix(app.wsgi_app, settings)
    app.before_request(begin)
    app.after_request(finish)
    for kind, handler in HANDLERS:
        app.register_error_handler(kind, handler)
    return app


def engine():
    return current_app.extensions["engine"]


def telemetry():
    return current_app.extensions["telemetry"]


def route():
    return request.url_rule.rule if request.url_rule else "other"


def begin():
    """Before every request: its id, its clock and, where keys are set, the name of its key."""
    g.request_id, g.started = id_of(request.headers.get("X-Request-ID", "")), time.perf_counter()
    g.key, g.error, g.read_s = None, None, None
    if request.content_length is not None:
        # Without this a body that stops early would pass as whole.
        request.environ.pop("wsgi.input_terminated", None)
    if engine().keys and request.path not in OPEN:
        g.key = key_name(request.headers.get("Authorization", ""), engine().keys)
        if g.key is None:
            return unauthorized()


def finish(response):
    """After every request: count it, log it, and add the headers of every response."""
    drain(request.environ, engine().settings)
    seconds = time.perf_counter() - g.started
    add_headers(response, g.request_id)
    telemetry().requests.labels(route(), response.status_code).inc()
    telemetry().request_seconds.labels(route(), response.status_code).observe(seconds)
    if request.path not in PROBES or response.status_code >= 400:
        say_event(
            "request",
            request_id=g.request_id,
            method=request.method,
            route=route(),
            status=response.status_code,
            seconds=round(seconds, 4),
            read_s=g.read_s,
            key=g.key,
            **({"error": g.error} if g.error else {}),
        )
    return response


# ---- errors ----


def error(status, message):
    """An error response, with its message in the log line of the request."""
    g.error = message
    return error_response(status, message)


def unauthorized():
    telemetry().rejections.labels("unauthorized").inc()
    sent = "Authorization" in request.headers
    reason = "this token is not known" if sent else "a token is needed"
    response = error(401, f"{reason}: send the header 'Authorization: Bearer TOKEN'")
    response.headers["WWW-Authenticate"] = "Bearer"
    return response


def busy(exception):
    if request.path not in PROBES:
        telemetry().rejections.labels(exception.reason).inc()
    g.error = str(exception)
    return busy_response(exception, engine().settings)


def slow_body(_):
    telemetry().rejections.labels("slow_body").inc()
    limit = engine().settings["BODY_TIMEOUT_S"]
    if time.perf_counter() - g.started >= limit:
        return error(408, f"the body did not arrive in full within {limit} s")
    return error(408, "the connection ended before the body had arrived in full")


def http_error(exception):
    """Flask's own refusals in our shape, with Flask's headers: a 405 must have `Allow`."""
    if exception.code == 413:
        size = f" of {request.content_length:,} bytes" if request.content_length else ""
        limit = request.max_content_length
        message = f"the request{size} is larger than the {limit:,} bytes allowed"
    else:
        root = request.script_root
        message = f"{request.method} {(root + request.path)[:100]!r}: {exception.name.lower()}"
        if exception.code == 405:
            message += f" (allowed: {', '.join(sorted(exception.valid_methods))})"
        message += f"; {root}/openapi.json lists all routes"
    response = error(exception.code, message)
    response.headers.extend((k, v) for k, v in exception.get_headers() if k != "Content-Type")
    return response


def unexpected(exception):
    """Our bug: a traceback for the log, and no details for the client."""
    say_event(
        "bug",
        level="error",
        exc_info=True,
        request_id=g.request_id,
        message=type(exception).__name__,
    )
    return error(500, "internal error")


HANDLERS = (
    (ImageError, lambda exception: error(exception.status, str(exception))),
    (Refused, lambda exception: error(exception.status, str(exception))),
    (Busy, busy),
    (ClientDisconnected, slow_body),
    (HTTPException, http_error),
    # gunicorn's message would repeat bytes of the body.
    (ParseException, lambda _: error(400, "the body's chunks are malformed")),
    (Exception, unexpected),
)


# ---- verdicts ----


def read():
    """-> (the detector that this request keeps, bytes of each image).

    Raises Busy, Refused and HTTPException's kinds.
    """
    started, detector, g.details = time.perf_counter(), engine().ready(), wants_details()
    refuse_coding()
    try:
        return detector, read_images(request, engine().settings["BATCH_LIMIT"])
    finally:
        g.read_s = round(time.perf_counter() - started, 4)
        telemetry().stage_seconds.labels("read").observe(g.read_s)


def wants_details():
    """?details=1, true or yes -> bool.

    Raises Refused for another value, and for a parameter that looks like a typing error of it. Any
    other parameter is ignored, since proxies and trackers add their own.
    """
    given = request.args.getlist("details")
    values = {FLAGS.get(value.lower()) for value in given} or {False}
    if len(values) > 1 or None in values:
        shown = ", ".join(repr(value[:20]) for value in given[:3])
        raise Refused(
            400, f"details={shown}: send details=1 (or true, yes) or details=0 (or false, no), once"
        )
    for name in request.args:
        close = difflib.get_close_matches(name[:20].lower(), ["details"], cutoff=0.75)
        if close and name != "details":
            raise Refused(400, f"unknown parameter {name[:20]!r}: did you mean details=1?")
    return values.pop()


def refuse_coding():
    """Raises Refused where the body is compressed."""
    coding = request.headers.get("Content-Encoding", "identity")
    if coding.lower() not in ("identity", ""):
        raise Refused(
            415,
            f"the body came with Content-Encoding {coding[:20]!r}, which is not taken: send it"
            " uncompressed",
        )


def note(detector, facts, waited, request_id):
    """Log one image: its verdict, or why there is none."""
    if "error" in facts:
        telemetry().image_errors.labels(facts["status"]).inc()
        return say_event("image_error", request_id=request_id, key=g.key, **facts)
    logged = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in facts.items()
        if name != "provenance"  # private to the sender
    }
    say_event(
        "verdict",
        request_id=request_id,
        key=g.key,
        **logged,
        wait_s=round(waited, 4),
        model_version=detector.model["versions"]["model"],
        model_sha256=detector.model["sha256"],
    )


def body_of(detector, facts):
    """The JSON for one image: the documented keys and, with ?details=1, the details."""
    if "error" in facts:
        return {"error": facts["error"]}
    body = answer(facts["classification"], facts["confidence"])
    if not g.details:
        return body
    names = ("p_fake", "uncertain", "decision", "provenance")
    return body | details(detector.model, *(facts.get(name) for name in names))


def with_model(detector, body):
    """JSON response, with the model's version and notice in the headers."""
    response = jsonify(body)
    response.headers["X-Model-Version"] = detector.model["versions"]["model"]
    if "notice" in detector.model:
        response.headers["X-Model-Notice"] = detector.model["notice"]
    return response


# ---- routes ----


@routes.post("/classify")
def classify():
    """One multipart field `image` -> {"classification": "real", "confidence": 0.95}."""
    detector, images = read()
    if len(images) != 1:
        return not_one(images)
    waited, (facts,) = engine().judge(detector, images, g.details)
    note(detector, facts, waited, g.request_id)
    if "error" in facts:
        return error(facts["status"], facts["error"])
    body = body_of(detector, facts)
    if g.details:
        stages = {
            "wait_s": waited,
            "read_s": g.read_s,
            **{f"{name}_s": facts[f"{name}_s"] for name in ("decode", "encode", "classify")},
        }
        body["timings"] = {name: round(seconds, 4) for name, seconds in stages.items()}
    return with_model(detector, body)


def not_one(images):
    """The error of a form that has not one image."""
    return error(
        400,
        f"the form has {len(images)} fields 'image', expected 1: send several to"
        f" {request.script_root}/classify/batch",
    )


@routes.post("/explain")
def explain():
    """One multipart field `image` -> {"rows": [[0.12, ...], ...], ...}: what moved its verdict."""
    detector, images = read()
    if len(images) != 1:
        return not_one(images)
    started = time.perf_counter()
    facts, rows = engine().explain(detector, images[0])
    if rows is None:
        note(detector, facts, 0, g.request_id)
        return error(facts["status"], facts["error"])
    body = {
        "rows": rows.round(4).tolist(),
        "passes": PASSES,
        "seconds": round(time.perf_counter() - started, 2),
        "meaning": MEANING,
    }
    return with_model(detector, body)


@routes.post("/classify/batch")
def classify_batch():
    """Several fields `image` -> {"results": [...]}, in order, each a verdict or {"error": ...}."""
    detector, images = read()
    limit = engine().settings["BATCH_LIMIT"]
    if len(images) > limit:
        return error(
            413,
            f"the form has {len(images)} images, at most {limit} are taken in a batch: send fewer"
            " at a time",
        )
    waited, results = engine().judge(detector, images, g.details)
    for number, facts in enumerate(results):
        note(detector, facts, waited, f"{g.request_id}.{number}")
    return with_model(detector, {"results": [body_of(detector, facts) for facts in results]})


@routes.post("/feedback")
def feedback():
    """{"request_id": ..., "label": "real" | "fake"} -> one line in the log, and nothing else.

    `evaluate.py --feedback` reads the line.
    """
    if g.key is None:
        return error(403, "feedback needs a token: set API_KEYS_FILE")
    refuse_coding()
    request.max_content_length = FEEDBACK_BYTES
    try:
        sent = request.get_json(silent=True)
    except RecursionError:  # a hundred thousand brackets
        sent = None
    if fault := feedback_fault(sent):
        return error(
            400,
            f'{fault}; send Content-Type: application/json and {{"request_id": "the X-Request-ID of'
            ' a verdict", "label": "real" or "fake"}',
        )
    telemetry().feedback.labels(sent["label"]).inc()
    say_event("feedback", request_id=sent["request_id"], label=sent["label"], key=g.key)
    return {"status": "noted"}


def feedback_fault(sent):
    """The fault of the JSON that was sent (None where it was no JSON), in words, or None."""
    if not request.mimetype:
        return "the body came without a Content-Type"
    if not request.is_json:
        return f"the body came as {request.mimetype[:60]!r}"
    if not isinstance(sent, dict):
        return "the body is no JSON object"
    if set(sent) != {"request_id", "label"}:
        return "the JSON has other keys than 'request_id' and 'label', or not both"
    if sent["label"] not in CLASSES:
        return "the label is neither 'real' nor 'fake'"
    if not isinstance(sent["request_id"], str) or not FEEDBACK_ID.fullmatch(sent["request_id"]):
        return "the request_id is not of 1 to 72 letters, digits, dots, underscores and hyphens"


@routes.get("/healthz")
def healthz():
    """The process responds. Never touches the model."""
    return {"status": "ok"}


@routes.get("/readyz")
def readyz():
    """200 once verdicts can be given."""
    engine().ready()
    return {"status": "ready"}


@routes.get("/model")
def model():
    """The model that serves: its version, its training data and its accuracy on test images."""
    detector = engine().ready()
    names, stored = named(detector), detector.model
    data = stored["training_data"]
    body = {
        **{name: names[name] for name in ("version", "commit", "sha256")},
        "encoder": {
            "name": names["encoder"],
            "identity": names["identity"],
            "precision": names["precision"],
        },
        "training_data": {
            **{name: data[name] for name in ("sha256", "real", "fake")},
            "sources": len(data["sources"]),
        },
        "threshold": stored["threshold"],
        "threshold_rule": stored["threshold_rule"],
        "band": stored["band"].tolist(),
        "metrics": stored["metrics"],
        "golden_floor": golden_floor(stored),
    }
    return body | ({"notice": stored["notice"]} if "notice" in stored else {})


@routes.get("/metrics")
def metrics():
    """For Prometheus."""
    return Response(generate_latest(telemetry().registry), content_type=CONTENT_TYPE_LATEST)


@routes.get("/openapi.json")
def openapi():
    return DOCUMENT | {"servers": [{"url": request.script_root or "/"}]}


@routes.get("/")
def page():
    """The page for people: a template that loads nothing from elsewhere."""
    detector, nonce = engine().detector, secrets.token_urlsafe(16)
    response = Response(
        render_template(
            "index.html",
            nonce=nonce,
            root=request.script_root and f"{request.script_root}/",
            max_bytes=engine().settings["MAX_UPLOAD_BYTES"],
            formats=formats.TAKEN,
            notice=detector and detector.model.get("notice"),
            model_version=detector and detector.model["versions"]["model"],
        )
    )
    response.headers.update(
        {
            "Content-Security-Policy": PAGE_POLICY.format(nonce),
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",  # the model that the page names may change
        }
    )
    return response
