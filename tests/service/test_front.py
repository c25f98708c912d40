"""Pages of other sites (CORS), and a path prefix: alone, under gunicorn, and behind nginx."""

import base64
import json
import os
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from browsing import assert_says, card, pick
from commands import ROOT
from engines import BEARER, TOKEN, client_on, counted, engine_of, held, lines, picture, upload
from live import Live, assert_error, free_port, wait_for
from patience import PATIENCE

from detector.base.errors import UsageError
from detector.service import front
from detector.service.settings import read_settings
from detector.verdict import Detector

pytestmark = pytest.mark.usefixtures("compiled_once")

SITE = "https://app.example"
ASKS = {
    "Origin": SITE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,x-request-id",
}
READABLE = {"X-Request-ID", "X-Model-Version", "X-Model-Notice", "Retry-After"}


def names(header):
    return {name.strip() for name in header.split(",")}


def cors(response):
    """Headers of the response that browsers read to protect sites, {name: value}."""
    kept = ("Access-Control-", "Vary")
    return {name: value for name, value in response.headers.items() if name.startswith(kept)}


def assert_shared(response, origin=SITE):
    """The page of that origin may read the response, without cookies."""
    headers = cors(response)
    assert headers.pop("Access-Control-Allow-Origin") == origin
    assert names(headers.pop("Access-Control-Expose-Headers")) == READABLE
    assert headers == {"Vary": "Origin"}
    assert len(response.headers.getlist("Access-Control-Allow-Origin")) == 1


@pytest.fixture(scope="module")
def shared(api_keys, compiled_once):
    """A test client of a service with API keys that two sites may call."""
    origins = f"http://localhost:3000, {SITE.upper()}"
    return client_on(API_KEYS_FILE=api_keys, CORS_ORIGINS=origins, MAX_UPLOAD_BYTES="20000")


# ---- other sites ----


def test_without_the_setting_no_site_may_call(client, keyed):
    assert cors(upload(client, "/classify", picture(), headers={"Origin": SITE})) == {}
    for path in ("/classify", "/model"):
        response = keyed.options(path, headers=ASKS)
        assert response.status_code == 401 and cors(response) == {}


@pytest.mark.parametrize("path", ["/classify", "/classify/batch", "/feedback", "/model", "/none"])
def test_a_preflight_passes_without_a_token(shared, path, caplog):
    response = shared.options(path, headers=ASKS)
    assert response.status_code == 204 and response.data == b""
    headers = cors(response)
    assert headers["Access-Control-Allow-Origin"] == SITE and headers["Vary"] == "Origin"
    allowed = names(headers["Access-Control-Allow-Headers"])
    assert allowed == {"Authorization", "Content-Type", "X-Request-ID"}
    assert names(headers["Access-Control-Allow-Methods"]) == {"GET", "POST"}
    assert int(headers["Access-Control-Max-Age"]) > 0
    assert "Access-Control-Allow-Credentials" not in headers
    assert lines(caplog) == []


@pytest.mark.parametrize("origin", [SITE, "http://localhost:3000"])
def test_a_verdict_can_be_read_by_each_named_site(shared, origin):
    response = upload(shared, "/classify", picture(), headers={**BEARER, "Origin": origin})
    assert response.status_code == 200 and response.headers["X-Model-Notice"]
    assert_shared(response, origin)


def test_the_headers_that_can_be_read_are_all_headers_of_our_own():
    """Others are either readable on all sites or of no use to a script."""
    code = "".join(path.read_text() for path in (ROOT / "detector" / "service").glob("*.py"))
    own = set(re.findall(r'headers\["([\w-]+)"\] = ', code))
    assert own - {"X-Content-Type-Options", "WWW-Authenticate"} == READABLE == names(front.EXPOSED)


SENDS = {
    400: lambda client, sent: upload(client, "/classify", headers=sent),
    401: lambda client, sent: client.get("/model", headers={"Origin": SITE}),
    404: lambda client, sent: client.get("/nowhere", headers=sent),
    405: lambda client, sent: client.put("/classify", headers=sent),
    413: lambda client, sent: upload(client, "/classify", bytes(30_000), headers=sent),
    415: lambda client, sent: upload(client, "/classify", b"hello", headers=sent),
}


@pytest.mark.parametrize("status", SENDS)
def test_an_error_can_be_read_too(shared, status):
    response = SENDS[status](shared, {**BEARER, "Origin": SITE})
    assert_error(response, status)
    assert_shared(response)


def test_a_bug_can_be_read_too(shared, monkeypatch):
    monkeypatch.setattr(Detector, "pixels", lambda *_: 1 / 0)
    response = upload(shared, "/classify", picture(), headers={**BEARER, "Origin": SITE})
    assert_error(response, 500)
    assert_shared(response)


@pytest.mark.parametrize("path", ["/classify", "/detector/classify/batch"])
def test_the_refusal_before_flask_can_be_read_too_and_follows_the_prefix(monkeypatch, caplog, path):
    client = client_on(SLOTS="1", QUEUE_LIMIT="0", CORS_ORIGINS=SITE, SCRIPT_NAME="/detector")
    telemetry, other = engine_of(client).telemetry, client.application.test_client()
    with held(monkeypatch, telemetry, lambda: upload(other, "/classify", picture())):
        response = upload(client, path, picture(), headers={"Origin": SITE})
        assert_error(response, 503, "busy")
        assert_shared(response)
        assert response.headers["Retry-After"]
        route = path.removeprefix("/detector")
        assert counted(telemetry, "requests_total", route=route, status=503) == 1
        refused = [line["route"] for line in lines(caplog, "request")]
        assert route not in refused  # Flask would have logged it


@pytest.mark.parametrize(
    "origin", ["https://evil.example", f"{SITE}.evil.example", f"{SITE}:8443", "null", "*", ""]
)
def test_another_site_may_neither_call_nor_read(shared, origin):
    sent = {**BEARER, "Origin": origin}
    assert cors(upload(shared, "/classify", picture(), headers=sent)) == {"Vary": "Origin"}
    response = shared.options("/classify", headers={**ASKS, "Origin": origin})
    assert response.status_code == 401 and cors(response) == {"Vary": "Origin"}


def test_a_response_without_an_origin_is_not_cached_for_a_site(shared):
    assert cors(shared.get("/openapi.json")) == {"Vary": "Origin"}


@pytest.mark.parametrize("origin", [SITE, "null"])
def test_a_star_allows_every_site(compiled_once, origin):
    client = client_on(CORS_ORIGINS="*")
    assert_shared(upload(client, "/classify", picture(), headers={"Origin": origin}), "*")
    assert client.options("/classify", headers={**ASKS, "Origin": origin}).status_code == 204


@pytest.mark.parametrize("sent", [{"Origin": SITE}, {}])
def test_other_requests_with_options_reach_flask(shared, sent):
    response = shared.options("/classify", headers={**BEARER, **sent})
    assert response.status_code == 200 and "POST" in response.headers["Allow"]


def test_a_request_is_no_preflight_for_one_of_its_headers(shared):
    assert shared.get("/openapi.json", headers=ASKS).status_code == 200


@pytest.mark.parametrize(
    "value, origins",
    [
        ("", []),
        ("*", ["*"]),
        ("https://app.example", [SITE]),
        ("https://app.example,http://localhost:3000", [SITE, "http://localhost:3000"]),
        (" HTTPS://App.Example ,\n http://[::1]:80443 ", [SITE, "http://[::1]:80443"]),
        ("http://a.b:443 https://a.b:80", ["http://a.b:443", "https://a.b:80"]),
        (
            "capacitor://localhost chrome-extension://ab",
            ["capacitor://localhost", "chrome-extension://ab"],
        ),
        ("http://my_app", ["http://my_app"]),
    ],
)
def test_origins_are_read_as_browsers_send_them(value, origins):
    assert read_settings({"CORS_ORIGINS": value})["CORS_ORIGINS"] == origins


@pytest.mark.parametrize(
    "value, named",
    [
        ("app.example", "app.example"),
        ("https://app.example/", "https://app.example/"),
        ("https://app.example/page", "https://app.example/page"),
        ("https://app.example:443", "https://app.example:443"),
        ("http://app.example:80", "http://app.example:80"),
        ("https://app.example:port", "https://app.example:port"),
        ("https://*.app.example", "https://*.app.example"),
        ("https://user@app.example", "https://user@app.example"),
        ("null", "null"),
        ("true", "true"),
        ("https://", "https://"),
        ("https://app.example; https://b.example", "https://app.example;"),
        ("https://app.example,*", "*"),
        ("* *", "*"),
        ("https://app.example\x1b[0m", r"https://app.example\x1b[0m"),
    ],
)
def test_what_is_no_origin_is_refused(value, named):
    with pytest.raises(UsageError) as caught:
        read_settings({"CORS_ORIGINS": value})
    assert str(caught.value).startswith(f"CORS_ORIGINS: {named} is no origin; write")
    assert len(str(caught.value).splitlines()) == 1


# ---- a path prefix ----

HOSTILE = [
    "//evil.example",
    "https://evil.example",
    "/a\\evil",
    '/a"onload="x',
    "/a'b",
    "/<script>alert(1)</script>",
    "/a b",
    "/a\r\nSet-Cookie: x=1",
    "/a%0d%0aX: 1",
    "/\u00e4",
    "/a?b",
    "/a#b",
    "a",
    "/a//b",
]


@pytest.fixture(scope="module")
def proxied(compiled_once):
    """A test client of a service behind a proxy that sets the prefix."""
    return client_on(TRUSTED_PROXIES="1")


def sees(client, path="", **headers):
    """The prefix that the page and openapi.json hold."""
    (page,) = re.findall(r"const ROOT = (.*);", client.get(f"{path}/", **headers).text)
    (server,) = client.get(f"{path}/openapi.json", **headers).json["servers"]
    root = json.loads(page)
    assert server == {"url": root.rstrip("/") or "/"} and (root == "" or root[-1] == "/")
    return root.rstrip("/")


def forwarded(prefix):
    return {"headers": {"X-Forwarded-Prefix": prefix}}


def test_by_default_the_header_is_ignored(client):
    assert sees(client, **forwarded("/detector")) == ""


@pytest.mark.parametrize(
    "header, prefix",
    [
        ("/detector", "/detector"),
        ("/detector/", "/detector"),
        ("/team-1/img_2/v1.0~x", "/team-1/img_2/v1.0~x"),
        ("/evil, /detector", "/detector"),
        ("/", ""),
        ("", ""),
    ],
)
def test_the_page_and_openapi_json_follow_the_header_of_a_trusted_proxy(proxied, header, prefix):
    assert sees(proxied, **forwarded(header)) == prefix


def test_the_header_counts_from_the_last_proxy_that_is_trusted(compiled_once):
    client = client_on(TRUSTED_PROXIES="2")
    assert sees(client, **forwarded("/evil, /outer, /inner")) == "/outer"
    assert sees(client, **forwarded("/inner")) == ""


def as_sent(response):
    """Text and names of headers, without the nonce that differs from page to page."""
    return re.sub(r'nonce="[^"]+"', "", response.text), sorted(response.headers.keys())


@pytest.mark.parametrize("prefix", HOSTILE)
def test_a_hostile_prefix_reaches_no_response(proxied, prefix):
    # The WSGI environment takes what no HTTP client sends, such as a line end.
    sent = {"environ_overrides": {"HTTP_X_FORWARDED_PREFIX": prefix}}
    assert sees(proxied, **sent) == ""
    for path in ("/", "/openapi.json", "/nowhere"):
        assert as_sent(proxied.get(path, **sent)) == as_sent(proxied.get(path))


def test_error_texts_follow_the_prefix(proxied):
    sent = {"X-Forwarded-Prefix": "/detector"}
    for response, words in (
        (proxied.get("/nowhere", headers=sent), ["'/detector/nowhere'", " /detector/openapi.json"]),
        (proxied.get("/classify", headers=sent), ["'/detector/classify'", "(allowed: "]),
        (
            upload(proxied, "/classify", picture(0), picture(1), headers=sent),
            ["to /detector/classify/batch"],
        ),
    ):
        assert_error(response, response.status_code, *words)


@pytest.fixture(scope="module")
def mounted(api_keys, compiled_once):
    """A test client of a service under SCRIPT_NAME, with API keys."""
    return client_on(SCRIPT_NAME="/detector", API_KEYS_FILE=api_keys)


@pytest.mark.parametrize("path", ["", "/detector"])
def test_under_script_name_every_route_responds_with_and_without_the_prefix(mounted, path):
    assert sees(mounted, path) == "/detector"
    for probe in ("healthz", "readyz", "metrics"):
        assert mounted.get(f"{path}/{probe}").status_code == 200
    assert mounted.get(f"{path}/model").status_code == 401
    assert mounted.get(f"{path}/model", headers=BEARER).status_code == 200
    assert upload(mounted, f"{path}/classify", picture(), headers=BEARER).status_code == 200


def test_the_prefix_itself_is_the_page_and_longer_names_are_not(mounted):
    response = mounted.get("/detector")
    assert response.status_code == 200 and 'const ROOT = "/detector/";' in response.text
    for path in ("/detectors", "/detectorhealthz", "/detector/detector/healthz", "/Detector/"):
        assert mounted.get(path, headers=BEARER).status_code == 404


def test_a_prefix_with_the_name_of_a_route_works(compiled_once):
    client = client_on(SCRIPT_NAME="/classify")
    assert upload(client, "/classify/classify", picture()).status_code == 200
    assert "<html" in client.get("/classify/").text


def test_the_header_of_a_trusted_proxy_comes_before_script_name(compiled_once):
    client = client_on(SCRIPT_NAME="/detector", TRUSTED_PROXIES="1")
    assert sees(client, "/detector", **forwarded("/outer/detector")) == "/outer/detector"
    assert sees(client, "/detector", **forwarded("//evil.example")) == "/detector"


@pytest.mark.parametrize("value", ["detector", "/", "/detector/", *HOSTILE])
def test_an_unfit_script_name_is_refused(value):
    with pytest.raises(UsageError, match="^SCRIPT_NAME=.*: must be a path such as /detector") as e:
        read_settings({"SCRIPT_NAME": value})
    assert len(str(e.value).splitlines()) == 1


def test_under_gunicorn_script_name_is_a_prefix_and_probes_stay(serve, photo):
    server = serve(SCRIPT_NAME="/detector")  # it waits for /readyz
    assert server.get("/healthz").status_code == 200 and server.get("/metrics").status_code == 200
    server.url += "/detector"
    assert server.post(photo).json()["classification"] in ("real", "fake")
    assert server.get("/openapi.json").json()["servers"] == [{"url": "/detector"}]
    assert 'const ROOT = "/detector/";' in server.get("").text
    moved = {"SCRIPT_NAME": "/detector/metrics", "X-Forwarded-Prefix": "/evil"}
    page = server.session.get(f"{server.url}/", headers=moved, timeout=PATIENCE)
    assert 'const ROOT = "/detector/";' in page.text
    assert "Traceback" not in server.log.read_text()


# ---- behind nginx, in a browser ----

# What a distribution's nginx.conf has around the configuration in the docs. Temporary files are
# in the test's folder.
NGINX = """
daemon off; master_process off; pid nginx.pid; error_log stderr warn;
events {{}}
http {{
  access_log off;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
{server}}}
"""
# A script of the other site: it posts an image, and returns all that it may read.
CALL = """async ([url, method, headers, size, credentials]) => {
  const body = method === "POST" ? new FormData() : undefined;
  const bytes = size ? new Uint8Array(size) : Uint8Array.from(atob(IMAGE), c => c.charCodeAt(0));
  if (body) body.append("image", new Blob([bytes]), "a.png");
  try {
    const response = await fetch(url, {method, headers, body, credentials});
    return {status: response.status, headers: Object.fromEntries(response.headers),
            body: await response.json()};
  } catch (error) { return {failed: error.name}; }
}"""


@pytest.fixture(scope="module")
def site():
    """Address of another site, which serves an empty page."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><link rel=icon href='data:,'>")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def behind(site, api_keys, tmp_path_factory):
    """The service with keys, for that site, behind the documented nginx: (service, nginx's URL)."""
    path = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    service = Live(folder, TRUSTED_PROXIES="1", CORS_ORIGINS=site, API_KEYS_FILE=api_keys)
    text = (ROOT / "docs" / "service.md").read_text()
    (block,) = re.findall(r"```nginx\n(.*?)```", text, re.DOTALL)
    for old, new in (
        ("listen 80;", f"listen 127.0.0.1:{port};"),
        ("127.0.0.1:8000", service.url[7:]),
    ):
        assert block.count(old) == 1
        block = block.replace(old, new)
    (folder / "nginx.conf").write_text(NGINX.format(server=block))
    with open(folder / "nginx.log", "w") as log:
        command = [path, "-e", "stderr", "-p", folder, "-c", folder / "nginx.conf"]
        nginx = subprocess.Popen(command, stdout=log, stderr=log)

    def listens():
        assert nginx.poll() is None, (folder / "nginx.log").read_text()
        try:
            return service.session.get(f"http://127.0.0.1:{port}/", timeout=PATIENCE)
        except requests.ConnectionError:
            return None

    try:
        wait_for(lambda: listens() is not None)
        yield service, f"http://127.0.0.1:{port}"
    finally:
        nginx.terminate()
        nginx.wait(PATIENCE)
        service.stop()
    # nginx warns of an upload that it wrote to a temporary file.
    assert "[warn]" not in (folder / "nginx.log").read_text()


@pytest.fixture
def open_page(browser):
    """Function: address -> its page in a browser context of its own."""
    contexts = []

    def go(url):
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(url)
        return page

    yield go
    for context in contexts:
        context.close()


def test_behind_nginx_requests_follow_the_prefix(behind, photo):
    service, url = behind

    def get(path, **headers):
        return service.session.get(url + path, headers=headers, timeout=PATIENCE)

    first = service.session.get(f"{url}/detector", allow_redirects=False, timeout=PATIENCE)
    assert (first.status_code, first.headers["Location"]) == (301, "/detector/")
    document = get("/detector/openapi.json", **{"X-Forwarded-Prefix": "/evil"}).json()
    assert document["servers"] == [{"url": "/detector"}]
    files = {"image": photo}
    response = service.session.post(
        f"{url}/detector/classify", files=files, headers=BEARER, timeout=PATIENCE
    )
    assert response.status_code == 200 and response.headers["X-Model-Version"]
    assert_error(get("/detector/nowhere", **BEARER), 404, "/detector/openapi.json")
    for probe in ("healthz", "readyz", "metrics"):
        assert get(f"/detector/{probe}").status_code == 404
        assert service.get(f"/{probe}").status_code == 200
    assert get("/classify").status_code == 404


def posts_of(page):
    """List to which the page's uploads add their addresses."""
    addresses = []
    page.on("request", lambda sent: sent.method == "POST" and addresses.append(sent.url))
    return addresses


@pytest.mark.parametrize("path", ["/detector/", "/detector"])
def test_behind_nginx_the_page_gets_verdicts(behind, open_page, photos, path):
    page = open_page(behind[1] + path)
    posts = posts_of(page)
    pick(page, photos["china.jpg"])
    page.get_by_label("Access token").wait_for()
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    assert_says(card(page, "china.jpg"), "%")
    assert set(posts) == {f"{behind[1]}/detector/classify?details=1"}


def test_under_script_name_the_page_without_the_last_slash_gets_verdicts(serve, open_page, photos):
    server = serve(SCRIPT_NAME="/detector")
    page = open_page(f"{server.url}/detector")
    posts = posts_of(page)
    pick(page, photos["china.jpg"])
    assert_says(card(page, "china.jpg"), "%")
    assert posts == [f"{server.url}/detector/classify?details=1"]


def test_behind_nginx_a_page_of_another_site_gets_verdicts_and_errors(behind, site, open_page):
    page, url = open_page(site), f"{behind[1]}/detector"
    page.evaluate("image => { window.IMAGE = image; }", base64.b64encode(picture()).decode())

    def call(path, method="POST", headers=None, size=0, credentials="same-origin"):
        return page.evaluate(CALL, [url + path, method, headers or {}, size, credentials])

    verdict = call("/classify", headers={**BEARER, "X-Request-ID": "mine"})
    assert verdict["status"] == 200 and verdict["body"]["classification"] in ("real", "fake")
    assert verdict["headers"]["x-request-id"] == "mine"
    assert {"x-model-version", "x-model-notice"} <= set(verdict["headers"])
    for status, response in {
        401: call("/classify"),
        404: call("/nowhere", headers=BEARER),
        413: call("/classify", headers=BEARER, size=10_600_000),
        415: call("/classify", headers=BEARER, size=100),
    }.items():
        assert response["status"] == status and response["body"]["error"], response
        assert response["headers"]["x-request-id"]
    assert call("/model", "GET", BEARER)["body"]["version"]
    assert call("/model", "GET", BEARER, credentials="include") == {"failed": "TypeError"}
    # The same server by another name is another site.
    page.goto(site.replace("127.0.0.1", "localhost"))
    page.evaluate("image => { window.IMAGE = image; }", base64.b64encode(picture()).decode())
    assert call("/classify", headers=BEARER) == {"failed": "TypeError"}
    assert call("/openapi.json", "GET") == {"failed": "TypeError"}
