"""C2PA manifests: files that c2pa-python signs here, then edited, stripped, torn and crafted; nothing is ever fetched."""

import contextlib
import http.server
import io
import json
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import c2pa
import numpy as np
import pytest
from crafted import segments
from engines import client_on, until, upload
from live import Live
from made_up import BASELINE
from patience import PATIENCE, costs_at_most
from PIL import Image
from signed import (
    TERMS,
    box,
    claimed,
    described,
    manifest,
    nested,
    sign,
    store,
    store_of,
    superbox,
    with_store,
)
from test_decoding import chunk, picture, saved

from detector.images import decoding, provenance
from detector.images.provenance import MADE, PARTLY, TAKEN, read_provenance
from detector.verdict import Detector

pytestmark = pytest.mark.usefixtures("compiled_once")

SIGNED = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")
UNTRUSTED = ["signingCredential.untrusted"]
SAID = {
    "state": "valid",
    "failures": UNTRUSTED,
    "says": MADE,
    "signer": "Test Studio",
    "claim_generator": "Test Generator 2.0",
}


def decoded(data):
    """As it is on the way to a verdict, when its provenance is read."""
    image = decoding.open_image(data)
    decoding.load_rgb(image)
    return image


def credentials(data):
    """Bytes -> what is told of their C2PA manifest."""
    return read_provenance(decoded(data), data)["c2pa"]


def plain(kind="PNG", **options):
    return saved(picture(size=(160, 120)), kind, **options)


# ---- what a manifest says ----


@pytest.mark.parametrize("kind", SIGNED)
def test_a_signed_file_is_valid_and_its_signer_is_one_that_nobody_vouches_for(kind):
    assert credentials(sign(plain(kind), kind)) == SAID
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
def test_the_source_type_of_its_actions_is_told_in_words(term, says):
    assert credentials(sign(plain(), "PNG", term)) == {**SAID, "says": says}


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
    found = {
        "label": "c2pa.metadata",
        "data": {
            "@context": {"Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"},
            "Iptc4xmpExt:DigitalSourceType": TERMS + "trainedAlgorithmicMedia",
        },
    }
    assert credentials(sign(plain(), "PNG", "digitalCreation", assertions=[found]))["says"] == MADE


def test_an_edited_picture_is_told_by_the_file_that_it_was_made_from():
    first = sign(plain(), "PNG")
    assert credentials(sign(plain(), "PNG", parent=sign(plain(), "PNG", parent=first))) == SAID
    assert (
        credentials(sign(plain(), "PNG", "digitalCapture", others=[first]))["says"] == TAKEN
    )  # a part is not the whole


def test_a_trust_list_would_tell_a_trusted_signer(monkeypatch):
    """Ours has none; that c2pa-python tells the two apart is what `untrusted` rests on."""
    from signed import chain

    trusting = provenance.C2PA_SETTINGS | {
        "trust": {"user_anchors": chain("Test Studio", 86400, None)[0].decode()}
    }
    monkeypatch.setattr(provenance, "C2PA_SETTINGS", trusting)
    assert credentials(sign(plain(), "PNG")) == {**SAID, "state": "trusted", "failures": []}


# ---- what breaks it ----


def test_one_changed_pixel_makes_it_invalid():
    data = bytearray(sign(plain("TIFF"), "TIFF"))
    data[len(data) // 3] ^= 1
    found = credentials(bytes(data))
    assert (found["state"], found["failures"]) == (
        "invalid",
        ["assertion.dataHash.mismatch", *UNTRUSTED],
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_manifest_moved_to_another_picture_is_invalid(kind):
    signed, other = (
        sign(plain(kind), kind),
        saved(picture(size=(160, 120)).transpose(Image.Transpose.ROTATE_180), kind),
    )
    if kind == "PNG":
        moved = with_store(other, store_of(signed))
    elif kind == "JPEG":
        moved = (
            other[:2]
            + signed[
                signed.index(b"\xff\xeb") : signed.rindex(b"\xff\xdb", 0, signed.index(b"\xff\xc0"))
            ]
            + other[2:]
        )
    else:
        tail = signed[signed.index(b"C2PA") :]
        moved = b"RIFF" + struct.pack("<I", len(other) + len(tail) - 8) + other[8:] + tail
    found = credentials(moved)
    assert (
        found["state"] == "invalid"
        and "assertion.dataHash.mismatch" in found["failures"]
        and found["says"] == MADE
    )


@pytest.mark.slow
def test_an_expired_certificate_is_invalid_and_not_just_untrusted():
    for seconds in (2, 20, 200):  # c2pa-python signs with none that has expired
        with contextlib.suppress(c2pa.C2paError):
            data = sign(plain(), "PNG", name="Expired", seconds=seconds)
            break
    until(lambda: credentials(data)["state"] == "invalid")
    found = credentials(data)
    assert (
        found["state"] == "invalid"
        and "signingCredential.expired" in found["failures"]
        and found["signer"] == "Expired"
    )


def test_a_string_behind_a_signed_jpeg_is_no_metadata_of_a_generator_and_makes_it_invalid():
    data = (
        sign(plain("JPEG"), "JPEG", "digitalCapture") + b"parameters\0Steps: 20, Sampler: Euler a"
    )
    found = read_provenance(decoded(data), data)
    assert found["metadata"] == [] and (found["c2pa"]["state"], found["c2pa"]["says"]) == (
        "invalid",
        TAKEN,
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_saving_anew_strips_it(kind):
    again = Image.open(io.BytesIO(sign(plain(kind), kind))).convert("RGB")
    assert credentials(saved(again, kind)) == {"state": "none"}


@pytest.mark.parametrize("kind", ["GIF", "BMP"])
def test_in_other_formats_it_is_not_looked_for(kind):
    assert credentials(plain(kind)) == {"state": "not looked for"}


# ---- nothing is fetched ----


@pytest.fixture
def elsewhere():
    """-> (an address, the paths that were asked there)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_POST = do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/m.c2pa", asked
        server.shutdown()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_manifest_that_lies_elsewhere_is_said_to_and_not_asked_for(kind, elsewhere):
    address, asked = elsewhere
    data = sign(plain(kind), kind, remote=address)
    assert credentials(data) == {"state": "elsewhere"} and asked == []
    with pytest.raises(c2pa.C2paError):  # left to itself the library asks
        c2pa.Reader(f"image/{kind.lower()}", io.BytesIO(data))
    assert asked == ["/m.c2pa"]


def test_nobody_is_asked_whether_a_certificate_is_still_good(elsewhere):
    address, asked = elsewhere
    data = sign(plain(), "PNG", ocsp=address)
    assert credentials(data) == SAID and asked == []
    with (
        c2pa.Context.from_dict({"verify": {"ocsp_fetch": True}}) as context,
        c2pa.Reader("image/png", io.BytesIO(data), context=context),
    ):
        assert len(asked) > 0  # the library would, if it were told to


# ---- crafted ----


def sparse(size=4_000_000):
    """A long list of a claim's, in few bytes each."""
    return claimed(b"\x9a" + struct.pack(">I", size) + b"\x00" * size)


def in_pieces(data, size):
    """A JPEG whose header has this store in segments of so many bytes."""
    head, parts = data[:8], [data[8:][i : i + size] for i in range(0, len(data) - 8, size)]
    bodies = [
        b"JP\0\1" + struct.pack(">I", number + 1) + head + part for number, part in enumerate(parts)
    ]
    jpeg = plain("JPEG")
    return (
        jpeg[:2]
        + b"".join(b"\xff\xeb" + struct.pack(">H", len(body) + 2) + body for body in bodies)
        + jpeg[2:]
    )


def full(number):
    return manifest(
        number,
        superbox(
            b"c2as", "c2pa.assertions", superbox(b"cbor", "c2pa.actions", box(b"cbor", b"\xa0"))
        ),
        superbox(b"c2cl", "c2pa.claim", box(b"cbor", b"\xa0")),
        superbox(b"c2cs", "c2pa.signature", box(b"cbor", b"\x80")),
    )


def packed():
    """A manifest to be unpacked, as brotli has it."""
    return store(
        superbox(
            b"c2cm",
            "urn:c2pa:00000000-0000-4000-8000-000000000000",
            box(b"brob", b"\x0b\x02\x80hello\x03"),
        )
    )


STORES = {
    "cut off": lambda: store_of(sign(plain(), "PNG"))[:-500],
    "cut off at its head": lambda: store_of(sign(plain(), "PNG"))[:20],
    "garbage": lambda: np.random.default_rng(0).bytes(9_000_000),
    "nine megabytes of nothing": lambda: bytes(9_000_000),
    "its label alone": lambda: superbox(b"c2pa", "c2pa"),
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
    "a hundred thousand assertions": lambda: store(
        manifest(
            0,
            superbox(
                b"c2as",
                "c2pa.assertions",
                *[
                    superbox(b"cbor", f"c2pa.actions__{i}", box(b"cbor", b"\xa0"))
                    for i in range(100_000)
                ],
            ),
        )
    ),
    "a claim nested a million deep": lambda: claimed(b"\x81" * 1_000_000 + b"\0"),
    "a claim of many numbers": sparse,
    "a claim of nine megabytes of text": lambda: claimed(
        b"\x7a" + struct.pack(">I", 9_000_000) + b"x" * 9_000_000
    ),
    "a claim that announces more than all memory": lambda: claimed(b"\x9b" + b"\xff" * 8),
    "a manifest to be unpacked": packed,
    "two hundred manifests": lambda: store(*map(full, range(200))),
}


@pytest.mark.parametrize("what", STORES)
def test_a_crafted_store_is_unreadable_and_costs_no_second(what):
    data = with_store(plain(), STORES[what]())
    image = decoded(data)
    with costs_at_most(16):
        assert read_provenance(image, data)["c2pa"] == {"state": "unreadable"}


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
    "many empty chunks behind the pixels": (
        lambda: plain()[:-12] + chunk(b"tEXt", b"a\0") * 150_000 + plain()[-12:],
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


@pytest.mark.parametrize("what", FILES)
def test_a_crafted_file_costs_no_second(what):
    make, state = FILES[what]
    data = make()
    image = decoded(data)
    with costs_at_most(16):
        assert read_provenance(image, data)["c2pa"]["state"] == state


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


def test_an_ordinary_store_does():
    assert not any(provenance.too_costly(kind, sign(plain(kind), kind)) for kind in SIGNED)


def test_a_store_of_thirty_manifests_that_are_in_order_is_read():
    data = sign(plain(), "PNG", others=[sign(plain(), "PNG")] * 2)
    for _ in range(30):
        data = sign(plain(), "PNG", parent=data)
    with costs_at_most(16):
        assert credentials(data) == SAID


def test_names_are_cut_and_printable():
    found = credentials(sign(plain(), "PNG", name="S\x1b[2J" + "x" * 50))
    assert found["signer"] == "S [2J" + "x" * 50


def test_a_report_of_any_shape_is_unreadable(monkeypatch):
    data = sign(plain(), "PNG")
    for report in (
        "{}",
        "[]",
        '{"active_manifest": "a", "manifests": {}}',
        "[" * 100_000,
        "no JSON",
        "x" * 5_000_000,
        (
            '{"active_manifest": "a", "manifests": {"a": {"assertions": [7]}}, "validation_state":'
            ' "Valid"}'
        ),
    ):
        monkeypatch.setattr(c2pa.Reader, "json", lambda _, report=report: report)
        assert credentials(data) == {"state": "unreadable"}


def test_changed_bytes_of_a_store_never_raise_and_are_never_valid_with_another_content():
    """What pads a signature is not signed: there a byte may change."""
    rng, whole = np.random.default_rng(0), store_of(sign(plain(), "PNG"))
    for _ in range(100):
        changed = bytearray(whole)
        for at in rng.integers(len(whole), size=rng.integers(1, 4)):
            changed[at] ^= rng.integers(1, 256)
        found = credentials(with_store(plain(), bytes(changed)))
        assert found["state"] in ("invalid", "unreadable", "none") or found == SAID


# ---- beside a verdict, never in it ----


@pytest.fixture(scope="module")
def client(compiled_once):
    return client_on()


def test_verdict_and_confidence_are_the_same_with_and_without_a_manifest(client):
    bare = plain()
    for term in ("trainedAlgorithmicMedia", "digitalCapture"):
        data = sign(bare, "PNG", term)
        without, signed = (upload(client, "/classify?details=1", one).json for one in (bare, data))
        assert (without["provenance"]["c2pa"]["state"], signed["provenance"]["c2pa"]["state"]) == (
            "none",
            "valid",
        )
        for name in set(without) - {"provenance", "timings"}:
            assert without[name] == signed[name], name
        assert Detector(BASELINE).classify(bare) == Detector(BASELINE).classify(data)


def test_a_broken_manifest_does_not_cost_the_verdict(client):
    body = upload(client, "/classify?details=1", with_store(plain(), nested(1000))).json
    assert body["classification"] in ("real", "fake") and body["provenance"]["c2pa"] == {
        "state": "unreadable"
    }


def test_many_at_a_time_each_get_their_own():
    files = [
        sign(plain(), "PNG", term) for term in ("trainedAlgorithmicMedia", "digitalCapture")
    ] + [plain()]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(credentials, files * 40))
    assert found == [SAID, {**SAID, "says": TAKEN}, {"state": "none"}] * 40


@pytest.mark.slow
def test_the_live_service_survives_all_of_it(tmp_path):
    live = Live(tmp_path)
    try:
        for data in [with_store(plain(), make()) for make in STORES.values()] + [
            make() for make, _ in FILES.values()
        ]:
            response = live.session.post(
                f"{live.url}/classify?details=1", files={"image": data}, timeout=PATIENCE
            )
            assert response.status_code == 200, response.text
            assert set(response.json()["provenance"]) == {"c2pa", "metadata"}
        data = sign(plain(), "PNG")
        assert (
            live.session.post(
                f"{live.url}/classify?details=1", files={"image": data}, timeout=PATIENCE
            ).json()["provenance"]["c2pa"]
            == SAID
        )
    finally:
        assert live.stop() == 0
    assert "Traceback" not in live.log.read_text() and json.loads(
        live.log.read_text().splitlines()[-1]
    )
