"""C2PA manifests: signed, edited, stripped, torn and crafted files. Nothing is ever fetched."""

import contextlib
import http.server
import io
import json
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import c2pa
import numpy as np
import pytest
from crafted import segments
from engines import client_on, until, upload
from made_up import BASELINE
from patience import PATIENCE
from PIL import Image
from signed import (
    TERMS,
    box,
    chain,
    described,
    full,
    manifest,
    nested,
    sign,
    store,
    store_of,
    superbox,
    with_store,
)
from written import chunk, encode, picture

from detector.images import decoding, provenance
from detector.images.provenance import MADE, PARTLY, TAKEN, read_provenance
from detector.verdict import Detector

pytestmark = pytest.mark.usefixtures("compiled_once")

SIGNED = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")
UNTRUSTED = ["signingCredential.untrusted"]
CLAIMS = {
    "state": "valid",
    "failures": UNTRUSTED,
    "says": MADE,
    "signer": "Test Studio",
    "claim_generator": "Test Generator 2.0",
}


def decoded(data):
    """An image with its pixels loaded, as when its provenance is read."""
    image = decoding.open_image(data)
    decoding.load_rgb(image)
    return image


def credentials(data):
    """Bytes -> claims of their C2PA manifest."""
    return read_provenance(decoded(data), data)["c2pa"]


def plain(kind="PNG", **options):
    return encode(picture(size=(160, 120)), kind, **options)


# ---- claims ----


@pytest.mark.parametrize("kind", SIGNED)
def test_a_signed_file_is_valid_and_its_signer_is_untrusted(kind):
    assert credentials(sign(plain(kind), kind)) == CLAIMS
    assert credentials(plain(kind)) == {"state": "none"}


@pytest.mark.parametrize(
    "term, says",
    [
        ("trainedAlgorithmicMedia", MADE),
        ("compositeWithTrainedAlgorithmicMedia", PARTLY),
        ("compositeSynthetic", PARTLY),
        ("digitalCapture", TAKEN),
        ("computationalCapture", TAKEN),
        ("digitalCreation", None),
    ],
)
def test_the_source_type_of_the_actions_is_reported_in_words(term, says):
    assert credentials(sign(plain(), "PNG", term)) == {**CLAIMS, "says": says}


def test_a_generative_edit_of_a_photograph_is_made_in_part_by_a_generator():
    actions = [
        {"action": "c2pa.created", "digitalSourceType": TERMS + "digitalCapture"},
        {
            "action": "c2pa.edited",
            "digitalSourceType": TERMS + "compositeWithTrainedAlgorithmicMedia",
        },
    ]
    assert credentials(sign(plain(), "PNG", actions=actions))["says"] == PARTLY


def test_the_source_type_may_stand_in_the_manifest_s_own_metadata():
    metadata = {
        "label": "c2pa.metadata",
        "data": {
            "@context": {"Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"},
            "Iptc4xmpExt:DigitalSourceType": TERMS + "trainedAlgorithmicMedia",
        },
    }
    assert (
        credentials(sign(plain(), "PNG", "digitalCreation", assertions=[metadata]))["says"] == MADE
    )


def test_an_edited_picture_has_the_source_type_of_its_parent():
    first = sign(plain(), "PNG")
    assert credentials(sign(plain(), "PNG", parent=sign(plain(), "PNG", parent=first))) == CLAIMS


def test_an_ingredient_does_not_give_its_source_type():
    data = sign(plain(), "PNG", "digitalCapture", others=[sign(plain(), "PNG")])
    assert credentials(data)["says"] == TAKEN


def test_c2pa_python_trusts_a_signer_on_a_trust_list(monkeypatch):
    """Our settings have no list, so every signer is untrusted."""
    anchors = chain("Test Studio", 86400, None)[0].decode()
    trusting = provenance.C2PA_SETTINGS | {"trust": {"user_anchors": anchors}}
    monkeypatch.setattr(provenance, "C2PA_SETTINGS", trusting)
    assert credentials(sign(plain(), "PNG")) == {**CLAIMS, "state": "trusted", "failures": []}


# ---- invalid manifests ----


def test_one_changed_pixel_makes_it_invalid():
    data = bytearray(sign(plain("TIFF"), "TIFF"))
    data[len(data) // 3] ^= 1
    failures = ["assertion.dataHash.mismatch", *UNTRUSTED]
    assert credentials(bytes(data)) == {**CLAIMS, "state": "invalid", "failures": failures}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_manifest_moved_to_another_picture_is_invalid(kind):
    signed = sign(plain(kind), kind)
    other = encode(picture(size=(160, 120)).transpose(Image.Transpose.ROTATE_180), kind)
    if kind == "PNG":
        moved = with_store(other, store_of(signed))
    elif kind == "JPEG":
        end = signed.rindex(b"\xff\xdb", 0, signed.index(b"\xff\xc0"))
        moved = other[:2] + signed[signed.index(b"\xff\xeb") : end] + other[2:]
    else:
        tail = signed[signed.index(b"C2PA") :]
        moved = b"RIFF" + struct.pack("<I", len(other) + len(tail) - 8) + other[8:] + tail
    claims = credentials(moved)
    assert claims["state"] == "invalid" and claims["says"] == MADE
    assert "assertion.dataHash.mismatch" in claims["failures"]


@pytest.mark.slow
def test_an_expired_certificate_is_invalid_and_not_just_untrusted():
    for seconds in (2, 20, 200):  # c2pa-python does not sign with an expired certificate
        with contextlib.suppress(c2pa.C2paError):
            data = sign(plain(), "PNG", name="Expired", seconds=seconds)
            break
    until(lambda: credentials(data)["state"] == "invalid")
    claims = credentials(data)
    assert "signingCredential.expired" in claims["failures"] and claims["signer"] == "Expired"


def test_a_text_behind_a_signed_jpeg_is_no_metadata_and_makes_it_invalid():
    signed = sign(plain("JPEG"), "JPEG", "digitalCapture")
    data = signed + b"parameters\0Steps: 20, Sampler: Euler a"
    claims = read_provenance(decoded(data), data)
    assert claims["metadata"] == []
    assert (claims["c2pa"]["state"], claims["c2pa"]["says"]) == ("invalid", TAKEN)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_saving_again_strips_a_manifest(kind):
    again = Image.open(io.BytesIO(sign(plain(kind), kind))).convert("RGB")
    assert credentials(encode(again, kind)) == {"state": "none"}


@pytest.mark.parametrize("kind", ["GIF", "BMP"])
def test_other_formats_are_not_looked_at(kind):
    assert credentials(plain(kind)) == {"state": "not looked for"}


# ---- nothing is fetched ----


@pytest.fixture
def elsewhere():
    """-> (an address, the paths of the requests there)."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        do_POST = do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/m.c2pa", requests
        server.shutdown()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_remote_manifest_is_reported_and_not_fetched(kind, elsewhere):
    address, requests = elsewhere
    data = sign(plain(kind), kind, remote=address)
    assert credentials(data) == {"state": "elsewhere"} and requests == []
    with pytest.raises(c2pa.C2paError):  # by default the library fetches
        c2pa.Reader(f"image/{kind.lower()}", io.BytesIO(data))
    assert requests == ["/m.c2pa"]


def test_the_status_of_a_certificate_is_not_fetched(elsewhere):
    address, requests = elsewhere
    data = sign(plain(), "PNG", ocsp=address)
    assert credentials(data) == CLAIMS and requests == []
    with (
        c2pa.Context.from_dict({"verify": {"ocsp_fetch": True}}) as context,
        c2pa.Reader("image/png", io.BytesIO(data), context=context),
    ):
        assert len(requests) > 0  # with this setting the library fetches


# ---- crafted ----


def claimed(cbor):
    """A store with this claim."""
    return store(full(0, cbor))


def in_pieces(data, size):
    """A JPEG with this store in segments of this many bytes."""
    head, jpeg, segments = data[:8], plain("JPEG"), []
    for number, at in enumerate(range(8, len(data), size), 1):
        body = b"JP\0\1" + struct.pack(">I", number) + head + data[at : at + size]
        segments.append(b"\xff\xeb" + struct.pack(">H", len(body) + 2) + body)
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def packed():
    """A store with a manifest that brotli compressed."""
    label = "urn:c2pa:00000000-0000-4000-8000-000000000000"
    return store(superbox(b"c2cm", label, box(b"brob", b"\x0b\x02\x80hello\x03")))


def many_assertions(number):
    inside = [superbox(b"cbor", f"c2pa.actions__{i}", box(b"cbor", b"\xa0")) for i in range(number)]
    return store(manifest(0, superbox(b"c2as", "c2pa.assertions", *inside)))


STORES = {
    "cut off": lambda: store_of(sign(plain(), "PNG"))[:-500],
    "cut off at its head": lambda: store_of(sign(plain(), "PNG"))[:20],
    "garbage": lambda: np.random.default_rng(0).bytes(9_000_000),
    "nine megabytes of nothing": lambda: bytes(9_000_000),
    "its label only": lambda: superbox(b"c2pa", "c2pa"),
    "boxes nested a hundred thousand deep": lambda: nested(100_000),
    "boxes nested ten deep": lambda: nested(10),
    "boxes of no length": lambda: (bytes(4) + b"jumb" + described(b"c2pa", "c2pa")) * 10_000,
    "boxes longer than there are bytes": (
        lambda: (struct.pack(">I", 1) + b"jumb" + b"\xff" * 8) * 10_000
    ),
    "a million small boxes": lambda: box(
        b"jumb", described(b"c2pa", "c2pa") + box(b"free", b"") * 1_000_000
    ),
    "thirty thousand manifests": lambda: store(*map(full, range(30_000))),
    "a hundred thousand assertions": lambda: many_assertions(100_000),
    "a claim nested a million deep": lambda: claimed(b"\x81" * 1_000_000 + b"\0"),
    "a claim of many numbers": lambda: claimed(
        b"\x9a" + struct.pack(">I", 4_000_000) + bytes(4_000_000)
    ),
    "a claim of nine megabytes of text": lambda: claimed(
        b"\x7a" + struct.pack(">I", 9_000_000) + b"x" * 9_000_000
    ),
    "a claim that announces more than all memory": lambda: claimed(b"\x9b" + b"\xff" * 8),
    "a manifest to be unpacked": packed,
    "two hundred manifests": lambda: store(*map(full, range(200))),
}


@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
def test_a_crafted_store_is_unreadable(make):
    assert credentials(with_store(plain(), make())) == {"state": "unreadable"}


FILES = {
    "a store in a thousand segments": (
        lambda: in_pieces(store_of(sign(plain(), "PNG")), 3),
        "unreadable",
    ),
    "many manifests cut where they would be seen": (
        lambda: in_pieces(store(*map(full, range(600))), 300),
        "unreadable",
    ),
    "a million marks of segments": (
        lambda: plain("JPEG") + b"\xff\xeb\xff\xff" * 2_400_000,
        "unreadable",
    ),
    "segments of another kind": (lambda: segments(0xEB, b"JP" + bytes(60_000)), "none"),
    "a film behind a JPEG": (
        lambda: plain("JPEG") + np.random.default_rng(0).bytes(9_000_000),
        "none",
    ),
    "XMP whose entities grow": (
        lambda: plain(
            "JPEG",
            xmp=b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
            + b"".join(b'<!ENTITY %c "%s">' % (b + 1, b"&%c;" % b * 10) for b in range(97, 106))
            + b']><x xmlns:d="http://purl.org/dc/terms/" d:provenance="&j;"/>',
        ),
        "none",
    ),
}


@pytest.mark.parametrize("make, state", FILES.values(), ids=FILES)
def test_a_crafted_file_is_unreadable_or_has_no_manifest(make, state):
    assert credentials(make())["state"] == state


@pytest.mark.parametrize("seconds, state", [(1e-3, "unreadable"), (1e-6, "none")])
def test_the_reads_of_a_file_end_after_their_time(seconds, state, monkeypatch):
    """The clock is the test's own: each look at it takes these seconds."""
    looks = count(1)
    monkeypatch.setattr(provenance.time, "thread_time", lambda: seconds * next(looks))
    chunks = chunk(b"tEXt", b"a\0") * 1000
    assert credentials(plain()[:-12] + chunks + plain()[-12:]) == {"state": state}


@pytest.mark.parametrize(
    "kind, make",
    [
        ("PNG", lambda: store(*map(full, range(500)))),
        ("JPEG", lambda: in_pieces(store(*map(full, range(500))), 180)),
        ("PNG", packed),
        ("JPEG", lambda: in_pieces(packed(), 40)),
        ("JPEG", lambda: in_pieces(bytes(50_000), 40)),
    ],
    ids=["boxes", "boxes cut apart", "packed", "packed and cut apart", "many pieces"],
)
def test_a_store_that_would_cost_seconds_does_not_reach_the_library(kind, make, monkeypatch):
    data = make() if kind == "JPEG" else with_store(plain(), make())
    monkeypatch.setattr(c2pa, "Reader", None)
    assert provenance.too_costly(kind, data) and credentials(data) == {"state": "unreadable"}


def test_an_ordinary_store_reaches_the_library():
    assert not any(provenance.too_costly(kind, sign(plain(kind), kind)) for kind in SIGNED)


def test_a_store_of_thirty_valid_manifests_is_read():
    data = sign(plain(), "PNG", others=[sign(plain(), "PNG")] * 2)
    for _ in range(30):
        data = sign(plain(), "PNG", parent=data)
    assert credentials(data) == CLAIMS


def test_names_are_printable():
    claims = credentials(sign(plain(), "PNG", name="S\x1b[2J" + "x" * 50))
    assert claims["signer"] == "S [2J" + "x" * 50


REPORTS = {
    "empty": "{}",
    "a list": "[]",
    "no active manifest": '{"active_manifest": "a", "manifests": {}}',
    "deep": "[" * 100_000,
    "no JSON": "no JSON",
    "long": "x" * 5_000_000,
    "an assertion that is a number": (
        '{"active_manifest": "a", "manifests": {"a": {"assertions": [7]}},'
        ' "validation_state": "Valid"}'
    ),
}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_a_report_of_another_form_is_unreadable(report, monkeypatch):
    monkeypatch.setattr(c2pa.Reader, "json", lambda _: report)
    assert credentials(sign(plain(), "PNG")) == {"state": "unreadable"}


def test_changed_bytes_of_a_store_never_raise_and_never_give_other_valid_claims():
    """The padding of a signature is not signed, so a byte there may change."""
    rng, whole = np.random.default_rng(0), store_of(sign(plain(), "PNG"))
    for _ in range(100):
        changed = bytearray(whole)
        for at in rng.integers(len(whole), size=rng.integers(1, 4)):
            changed[at] ^= rng.integers(1, 256)
        claims = credentials(with_store(plain(), bytes(changed)))
        assert claims["state"] in ("invalid", "unreadable", "none") or claims == CLAIMS


# ---- verdicts ----


@pytest.fixture(scope="module")
def client(compiled_once):
    return client_on()


def test_verdict_and_confidence_are_the_same_with_and_without_a_manifest(client):
    states = {plain(): "none"}
    for term in ("trainedAlgorithmicMedia", "digitalCapture"):
        states[sign(plain(), "PNG", term)] = "valid"
    first, *others = (upload(client, "/classify?details=1", data).json for data in states)
    for body, state in zip((first, *others), states.values(), strict=True):
        assert body["provenance"]["c2pa"]["state"] == state
        for name in set(first) - {"provenance", "timings"}:
            assert body[name] == first[name], name
    detector = Detector(BASELINE)
    assert len({detector.classify(data) for data in states}) == 1


def test_an_unreadable_manifest_does_not_prevent_the_verdict(client):
    body = upload(client, "/classify?details=1", with_store(plain(), nested(1000))).json
    assert body["classification"] in ("real", "fake")
    assert body["provenance"]["c2pa"] == {"state": "unreadable"}


def test_concurrent_reads_each_get_their_own_claims():
    terms = "trainedAlgorithmicMedia", "digitalCapture"
    files = [*(sign(plain(), "PNG", term) for term in terms), plain()]
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(credentials, files * 40))
    assert claims == [CLAIMS, {**CLAIMS, "says": TAKEN}, {"state": "none"}] * 40


@pytest.mark.slow
def test_the_live_service_survives_all_crafted_files(serve):
    live = serve()

    def claims(data):
        options = {"files": {"image": data}, "timeout": PATIENCE}
        response = live.session.post(f"{live.url}/classify?details=1", **options)
        assert response.status_code == 200, response.text
        return response.json()["provenance"]

    for data in [with_store(plain(), make()) for make in STORES.values()]:
        assert set(claims(data)) == {"c2pa", "metadata"}
    for make, _ in FILES.values():
        assert set(claims(make())) == {"c2pa", "metadata"}
    assert claims(sign(plain(), "PNG"))["c2pa"] == CLAIMS
    assert live.stop() == 0
    log = live.log.read_text()
    assert "Traceback" not in log and json.loads(log.splitlines()[-1])
