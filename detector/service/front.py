"""What a request passes before Flask, and what Flask's responses share with it.

The path prefix comes first, then the origins of other sites, then the refusal of uploads.
"""

import contextlib
import json
import re
import time
import uuid

from flask import Response
from gunicorn.http.errors import ParseException
from werkzeug.middleware.proxy_fix import ProxyFix

from detector.service.settings import PREFIX, key_name

UPLOADS = ("/classify", "/classify/batch", "/explain")
ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
EXPOSED = "X-Request-ID, X-Model-Version, X-Model-Notice, Retry-After"
PREFLIGHT = [
    ("Access-Control-Allow-Methods", "GET, POST"),
    ("Access-Control-Allow-Headers", "Authorization, Content-Type, X-Request-ID"),
    ("Access-Control-Max-Age", "7200"),  # seconds; Chromium takes no more
]


def under_prefix(inner, settings):
    """-> WSGI app under a path prefix: X-Forwarded-Prefix of a trusted proxy, or SCRIPT_NAME.

    A path may come without SCRIPT_NAME, since probes go to the service itself. An unfit header is
    ignored, so that no prefix needs escaping.
    """
    prefix = settings["SCRIPT_NAME"]

    def wsgi(environ, start_response):
        forwarded = environ.get("SCRIPT_NAME", "").rstrip("/")  # ProxyFix has put it there
        environ["SCRIPT_NAME"] = forwarded if PREFIX.fullmatch(forwarded) else prefix
        if f"{environ['PATH_INFO']}/".startswith(f"{prefix}/"):
            # Flask would redirect an empty path to an address that the proxy may not know.
            environ["PATH_INFO"] = environ["PATH_INFO"].removeprefix(prefix) or "/"
        return inner(environ, start_response)

    return ProxyFix(wsgi, x_for=0, x_proto=0, x_prefix=settings["TRUSTED_PROXIES"])


def allow_origins(inner, origins):
    """-> WSGI app whose responses the pages of these origins may read (CORS), errors included.

    It answers a preflight itself, which carries no token. No response allows cookies.
    """
    if not origins:
        return inner

    def wsgi(environ, start_response):
        origin, headers = environ.get("HTTP_ORIGIN"), [("Vary", "Origin")]
        if origin in origins or "*" in origins:
            headers.append(("Access-Control-Allow-Origin", "*" if "*" in origins else origin))
            headers.append(("Access-Control-Expose-Headers", EXPOSED))
            asks = "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
            if asks and environ["REQUEST_METHOD"] == "OPTIONS":
                start_response("204 No Content", headers + PREFLIGHT)
                return []

        def start(status, given, *error):
            return start_response(status, given + headers, *error)

        return inner(environ, start)

    return wsgi


def turn_away(app):
    """-> WSGI app that refuses an upload with 503 before Flask, where no verdict is possible.

    Under four times the load most uploads are refused. A refusal through Flask costs more, and this
    time is missing for verdicts. For the same reason these uploads get no log line each.
    """
    inner, engine, telemetry = app.wsgi_app, app.extensions["engine"], app.extensions["telemetry"]

    def wsgi(environ, start_response):
        started = time.perf_counter()
        route = "/" + environ["PATH_INFO"].lstrip("/")  # as Flask sees it
        upload = route in UPLOADS and environ["REQUEST_METHOD"] == "POST"
        refusal = engine.refusal() if upload else None
        authorization = environ.get("HTTP_AUTHORIZATION", "")
        # A client without a known key gets 401 from Flask, and learns nothing about the load.
        if refusal is None or engine.keys and not key_name(authorization, engine.keys):
            return inner(environ, start_response)
        drain(environ, engine.settings)
        telemetry.turned_away(route, refusal.reason, time.perf_counter() - started)
        response = busy_response(refusal, engine.settings)
        add_headers(response, id_of(environ.get("HTTP_X_REQUEST_ID", "")))
        return response(environ, start_response)

    return wsgi


def drain(environ, settings):
    """Read the rest of a request's body.

    Many clients see a broken connection where the response comes before they have sent the body.
    """
    left = 2 * settings["MAX_UPLOAD_BYTES"]
    # Where the body is cut off or malformed, gunicorn closes the connection.
    with contextlib.suppress(OSError, ParseException):
        while left > 0 and (part := environ["wsgi.input"].read(1 << 20)):
            left -= len(part)


# ---- shared with Flask ----


def id_of(sent):
    """The client's request id, or a new id where the client's is unfit."""
    return sent if ID.fullmatch(sent) else uuid.uuid4().hex


def add_headers(response, request_id):
    response.headers["X-Request-ID"] = request_id
    response.headers["X-Content-Type-Options"] = "nosniff"


def error_response(status, message):
    """The shape of every error: {"error": message}. Works without Flask's context, too."""
    body = json.dumps({"error": message}, separators=(",", ":")) + "\n"
    return Response(body, status, mimetype="application/json")


def busy_response(exception, settings):
    """503, and after how many seconds to try again."""
    response = error_response(503, str(exception))
    response.headers["Retry-After"] = str(settings["QUEUE_TIMEOUT_S"])
    return response
