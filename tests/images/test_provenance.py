"""Claims in metadata about a file's origin: each field, fields without claims, crafted fields."""

import io
import json
import re
import struct
import sys
from itertools import pairwise

import numpy as np
import pytest
from commands import ROOT
from crafted import LONG, grid, segments, tiff
from engines import client_on, lines, upload
from made_up import BASELINE
from openapi_document import DOCUMENT, faults
from PIL import Image, PngImagePlugin
from written import animation, chunk, encode, picture, png

from detector.images import decoding, provenance
from detector.images.provenance import (
    LONGEST,
    MADE,
    MARKS,
    PARTLY,
    SAVED,
    SOURCE_TYPES,
    TAKEN,
    clean,
    in_words,
    read_metadata,
    read_provenance,
)
from detector.verdict import Detector

pytestmark = pytest.mark.usefixtures("compiled_once")

WEBUI = (
    "a secret garden\nNegative prompt: blur\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1,"
    " Size: 512x512, Version: v1.10.1"
)
PROMPT = json.dumps(
    {"3": {"inputs": {"seed": 1, "text": "a secret garden"}, "class_type": "KSampler"}}
)
WORKFLOW = json.dumps(
    {"last_node_id": 9, "nodes": [{"id": 1, "widgets_values": ["a secret garden"]}]}
)
NOVELAI = json.dumps({"prompt": "a secret garden", "steps": 28, "uc": "blur", "sampler": "k_euler"})
MIDJOURNEY = "a secret garden --ar 3:2 --v 6 Job ID: 5c1b3b6e-0000-4000-8000-0123456789ab"
TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype/"
NAMESPACES = (
    'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
)


def claims(data):
    """Bytes -> [(where, says, name)], read after the pixels, as for a verdict."""
    image = decoding.open_image(data)
    decoding.load_rgb(image)
    return [tuple(claim.values()) for claim in read_metadata(image)]


def texts(compressed=False, international=False, **fields):
    """A PNG with these text chunks."""
    info = PngImagePlugin.PngInfo()
    add = info.add_itxt if international else info.add_text
    for key, value in fields.items():
        add("sd-metadata" if key == "sd_metadata" else key, value, zip=compressed)
    return encode(picture(), "PNG", pnginfo=info)


def exif(kind="JPEG", comment=None, **tags):
    """A file with EXIF: {'t305': value}, and a UserComment."""
    data = Image.Exif()
    data.update({int(tag[1:]): value for tag, value in tags.items()})
    if comment is not None:
        data.get_ifd(0x8769)[0x9286] = comment
    return encode(picture(), kind, exif=data.tobytes())


def packet(inside="", **attributes):
    named = " ".join(f'{name.replace("__", ":")}="{value}"' for name, value in attributes.items())
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta'
        ' xmlns:x="adobe:ns:meta/"><rdf:RDF'
        ' xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
        f' {NAMESPACES} {named}>{inside}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def typed(declared, entity="a"):
    """XMP with a document type that declares entities; one of them is the creator tool."""
    body = packet(f"<xmp:CreatorTool>&{entity};</xmp:CreatorTool>").partition(b"?>")[2]
    return b"<!DOCTYPE x [" + declared + b"]>" + body


def with_xmp(xmp, kind="JPEG"):
    if kind == "PNG":
        return png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    return encode(picture(), kind, **({"tiffinfo": {700: xmp}} if kind == "TIFF" else {"xmp": xmp}))


def iptc(**records):
    """A JPEG with IPTC-IIM in Photoshop's resource 0x0404: {'r110': bytes}."""
    body = b"".join(
        b"\x1c\2" + bytes([int(name[1:])]) + struct.pack(">H", len(value)) + value
        for name, value in records.items()
    )
    head = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(body))
    resource = head + body + b"\0" * (len(body) & 1)
    return segments(0xED, resource, len(resource) + 4)


# ---- each field ----

FIELDS = {
    "webui's text": (
        lambda: texts(parameters=WEBUI),
        "PNG text 'parameters'",
        MADE,
        "Stable Diffusion web UI",
    ),
    "webui's text, compressed": (
        lambda: texts(True, parameters=WEBUI),
        "PNG text 'parameters'",
        MADE,
        "Stable Diffusion web UI",
    ),
    "webui's text, international": (
        lambda: texts(False, True, parameters=WEBUI),
        "PNG text 'parameters'",
        MADE,
        "Stable Diffusion web UI",
    ),
    "ComfyUI's prompt": (lambda: texts(prompt=PROMPT), "PNG text 'prompt'", MADE, "ComfyUI"),
    "ComfyUI's workflow": (
        lambda: texts(workflow=WORKFLOW),
        "PNG text 'workflow'",
        MADE,
        "ComfyUI",
    ),
    "InvokeAI": (
        lambda: texts(invokeai_metadata="{}"),
        "PNG text 'invokeai_metadata'",
        MADE,
        "InvokeAI",
    ),
    "InvokeAI's graph": (
        lambda: texts(invokeai_graph="{}"),
        "PNG text 'invokeai_graph'",
        MADE,
        "InvokeAI",
    ),
    "InvokeAI's workflow": (
        lambda: texts(invokeai_workflow="{}"),
        "PNG text 'invokeai_workflow'",
        MADE,
        "InvokeAI",
    ),
    "an older InvokeAI": (
        lambda: texts(sd_metadata="{}"),
        "PNG text 'sd-metadata'",
        MADE,
        "InvokeAI",
    ),
    "the oldest InvokeAI": (
        lambda: texts(Dream='"a garden" -s 50'),
        "PNG text 'Dream'",
        MADE,
        "InvokeAI",
    ),
    "NovelAI's name": (lambda: texts(Software="NovelAI"), "PNG text 'Software'", MADE, "NovelAI"),
    "NovelAI's comment": (lambda: texts(Comment=NOVELAI), "PNG text 'Comment'", MADE, "NovelAI"),
    "NovelAI's source": (
        lambda: texts(Source="NovelAI Diffusion V4 F6E18726"),
        "PNG text 'Source'",
        MADE,
        "NovelAI",
    ),
    "Midjourney": (
        lambda: texts(Description=MIDJOURNEY),
        "PNG text 'Description'",
        MADE,
        "Midjourney",
    ),
    "a PNG's software": (
        lambda: texts(Software="GIMP 3.0"),
        "PNG text 'Software'",
        SAVED,
        "GIMP 3.0",
    ),
    "EXIF software": (
        lambda: exif(t305="Adobe Photoshop 27.1"),
        "EXIF Software",
        SAVED,
        "Adobe Photoshop 27.1",
    ),
    "EXIF software that generates": (
        lambda: exif(t305="AI generated;txt2img;flux"),
        "EXIF Software",
        MADE,
        "AI generated;txt2img;flux",
    ),
    "a camera": (
        lambda: exif(t271="FUJIFILM", t272="X-T5"),
        "EXIF Make and Model",
        TAKEN,
        "FUJIFILM X-T5",
    ),
    "a camera that names its maker twice": (
        lambda: exif(t271="Canon", t272="Canon EOS R5"),
        "EXIF Make and Model",
        TAKEN,
        "Canon EOS R5",
    ),
    "a model alone": (lambda: exif("PNG", t272="X-T5"), "EXIF Make and Model", TAKEN, "X-T5"),
    "a generator as maker": (
        lambda: exif(t271="Black Forest Labs", t272="flux-dev"),
        "EXIF Make and Model",
        MADE,
        "Black Forest Labs flux-dev",
    ),
    "ComfyUI's workflow as maker": (
        lambda: exif("WEBP", t271="workflow:" + WORKFLOW),
        "EXIF Make and Model",
        MADE,
        "ComfyUI",
    ),
    "ComfyUI's workflow, whatever it holds": (
        lambda: exif("WEBP", t271='workflow: {"a": "a secret garden"}'),
        "EXIF Make and Model",
        MADE,
        "ComfyUI",
    ),
    "ComfyUI's prompt as model": (
        lambda: exif("WEBP", t272="prompt:" + PROMPT),
        "EXIF Make and Model",
        MADE,
        "ComfyUI",
    ),
    "webui's comment": (
        lambda: exif(comment=b"UNICODE\0" + WEBUI.encode("utf-16-be")),
        "EXIF UserComment",
        MADE,
        "Stable Diffusion web UI",
    ),
    "a comment of the other byte order": (
        lambda: exif("WEBP", b"UNICODE\0" + WEBUI.encode("utf-16-le")),
        "EXIF UserComment",
        MADE,
        "Stable Diffusion web UI",
    ),
    "a comment in ASCII": (
        lambda: exif("PNG", b"ASCII\0\0\0" + WEBUI.encode()),
        "EXIF UserComment",
        MADE,
        "Stable Diffusion web UI",
    ),
    "NovelAI's WebP": (
        lambda: exif("WEBP", b"ASCII\0\0\0" + json.dumps({"Software": "NovelAI"}).encode()),
        "EXIF UserComment",
        MADE,
        "NovelAI",
    ),
    "a description": (lambda: exif(t270=MIDJOURNEY), "EXIF ImageDescription", MADE, "Midjourney"),
    "EXIF of an AVIF": (
        lambda: exif("AVIF", t305="Midjourney"),
        "EXIF Software",
        MADE,
        "Midjourney",
    ),
    "EXIF of a TIFF": (
        lambda: encode(picture(), "TIFF", tiffinfo={305: "Capture One"}),
        "EXIF Software",
        SAVED,
        "Capture One",
    ),
    "XMP creator tool": (
        lambda: with_xmp(packet(xmp__CreatorTool="Adobe Lightroom 14")),
        "XMP CreatorTool",
        SAVED,
        "Adobe Lightroom 14",
    ),
    "XMP creator tool that generates": (
        lambda: with_xmp(packet("<xmp:CreatorTool>Adobe Firefly</xmp:CreatorTool>")),
        "XMP CreatorTool",
        MADE,
        "Adobe Firefly",
    ),
    "XMP source type": (
        lambda: with_xmp(packet(Iptc4xmpExt__DigitalSourceType=TERMS + "trainedAlgorithmicMedia")),
        "XMP DigitalSourceType",
        MADE,
        "trainedAlgorithmicMedia",
    ),
    "XMP source type in part": (
        lambda: with_xmp(
            packet(Iptc4xmpExt__DigitalSourceType=TERMS + "compositeWithTrainedAlgorithmicMedia"),
            "WEBP",
        ),
        "XMP DigitalSourceType",
        PARTLY,
        "compositeWithTrainedAlgorithmicMedia",
    ),
    "XMP source type as an element": (
        lambda: with_xmp(
            packet(
                f"<Iptc4xmpExt:DigitalSourceType>\n {TERMS}digitalCapture\n"
                "</Iptc4xmpExt:DigitalSourceType>"
            ),
            "PNG",
        ),
        "XMP DigitalSourceType",
        TAKEN,
        "digitalCapture",
    ),
    "XMP source type as a resource": (
        lambda: with_xmp(
            packet(
                f'<Iptc4xmpExt:DigitalSourceType rdf:resource="{TERMS}trainedAlgorithmicMedia"/>'
            ),
            "AVIF",
        ),
        "XMP DigitalSourceType",
        MADE,
        "trainedAlgorithmicMedia",
    ),
    "XMP credit": (
        lambda: with_xmp(packet(photoshop__Credit="Made with Google AI"), "TIFF"),
        "XMP Credit",
        MADE,
        "Made with Google AI",
    ),
    "XMP system": (
        lambda: with_xmp(packet(Iptc4xmpExt__AISystemUsed="Some Model 3")),
        "XMP AISystemUsed",
        MADE,
        "Some Model 3",
    ),
    "IPTC credit": (
        lambda: iptc(r110=b"Made with Google AI"),
        "IPTC Credit",
        MADE,
        "Made with Google AI",
    ),
    "IPTC program": (
        lambda: iptc(r65=b"Photo Mechanic"),
        "IPTC OriginatingProgram",
        SAVED,
        "Photo Mechanic",
    ),
}


@pytest.mark.parametrize("make, where, says, name", FIELDS.values(), ids=FIELDS)
def test_each_field_is_reported_with_its_place_and_without_the_prompt(make, where, says, name):
    assert claims(make()) == [(where, says, name)]


@pytest.mark.parametrize("international", [False, True])
def test_a_workflow_of_megabytes_is_reported_like_a_short_workflow(international):
    nodes = [{"id": i, "widgets_values": ["a secret garden"]} for i in range(60_000)]
    workflow = json.dumps({"last_node_id": 9, "nodes": nodes})
    assert len(workflow) > 2_000_000
    assert claims(texts(True, international, workflow=workflow)) == [
        ("PNG text 'workflow'", MADE, "ComfyUI")
    ]


def test_a_text_with_a_wrong_checksum_is_reported():
    data = png(chunk(b"tEXt", b"parameters\0" + WEBUI.encode("latin-1"), checksum=12345))
    assert claims(data) == [("PNG text 'parameters'", MADE, "Stable Diffusion web UI")]


def test_several_claims_are_reported_in_a_fixed_order():
    data = texts(
        Software="NovelAI",
        Comment=NOVELAI,
        Description="a secret garden",
        Title="NovelAI generated image",
        parameters=WEBUI,
    )
    assert [where for where, _, _ in claims(data)] == [
        "PNG text 'parameters'",
        "PNG text 'Comment'",
        "PNG text 'Software'",
    ]


ORDINARY = {
    "nothing": lambda: encode(picture(), "PNG"),
    "texts of other programs": lambda: texts(
        parameters="lr=0.1",
        prompt="type your name",
        workflow="scan, crop",
        Comment="for Anna",
        Source="a scanner",
        Description="our garden in Steps: of stone",
    ),
    "EXIF of a photograph": lambda: exif(
        t270="our garden", t315="A. Person", comment=b"ASCII\0\0\0five steps: 20 metres"
    ),
    "people who are credited": lambda: with_xmp(
        packet(photoshop__Credit="A. Dalle / Agency", photoshop__City="Paris")
    ),
    "XMP with a document type": lambda: with_xmp(typed(b'<!ENTITY a "Midjourney">')),
    "another source type": lambda: with_xmp(
        packet(Iptc4xmpExt__DigitalSourceType=TERMS + "negativeFilm")
    ),
    "properties of the same name elsewhere": lambda: with_xmp(
        packet('<a:Credit xmlns:a="urn:a">Made with Google AI</a:Credit>')
    ),
    "an IPTC credit": lambda: iptc(r110=b"A. Person", r80=b"A. Person"),
    "a string behind a JPEG": (
        lambda: (
            encode(picture(), "JPEG")
            + b"parameters\0"
            + WEBUI.encode()
            + packet(xmp__CreatorTool="Midjourney")
        )
    ),
    "a string behind a PNG": (
        lambda: encode(picture(), "PNG") + chunk(b"tEXt", b"parameters\0" + WEBUI.encode())
    ),
    "a comment of a JPEG": lambda: encode(
        picture(), "JPEG", comment="Midjourney Job ID: 5c1b3b6e-0000"
    ),
    "a PNG's key in a WebP": lambda: encode(picture(), "WEBP") + b"parameters\0" + WEBUI.encode(),
}


@pytest.mark.parametrize("make", ORDINARY.values(), ids=ORDINARY)
def test_metadata_without_a_claim_are_not_reported(make):
    assert claims(make()) == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_saving_again_strips_the_claims(kind):
    marked = exif(kind, b"ASCII\0\0\0" + WEBUI.encode(), t305="Midjourney")
    assert len(claims(marked)) == 2
    again = Image.open(io.BytesIO(marked)).convert("RGB")
    again.info = {}
    assert claims(encode(again, kind)) == []


def test_names_are_one_printable_line_of_two_hundred_characters():
    assert clean("a\x1b[31m\n b\u202egpj\0\x85c\ud800") == "a [31m b gpj c"
    assert clean(b"caf\xc3\xa9\xff") == "caf\u00e9\ufffd"
    assert len(clean("x" * 10_000_000)) == LONGEST
    assert [clean(value) for value in (None, 7, (1, 2), {})] == [""] * 4
    ((_, _, name),) = claims(texts(Software="e\x1b[2J" + "vil " * 1000))
    assert len(name) <= LONGEST and name.isprintable() and name.startswith("e [2Jvil")


def test_a_jpeg_of_two_pictures_is_read_like_any_jpeg():
    """Telephones write such files."""
    data = Image.Exif()
    data[272] = "Pixel 9"
    assert claims(animation("MPO", exif=data)) == [("EXIF Make and Model", TAKEN, "Pixel 9")]


def test_provenance_in_words_is_one_line():
    manifest = {"state": "valid", "says": MADE, "signer": "A", "claim_generator": "B 1"}
    metadata = [{"where": "EXIF Software", "says": SAVED, "name": "C"}]
    assert in_words({"c2pa": manifest, "metadata": metadata}) == (
        "C2PA valid, made by a generator, signed by A, with B 1,"
        " EXIF Software: saved by software (C)"
    )
    assert in_words({"c2pa": {"state": "none"}, "metadata": []}) == "C2PA none"


# ---- crafted ----


def entities():
    """A billion laughs."""
    names = "abcdefghij"
    steps = "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in pairwise(names))
    return typed(f'<!ENTITY a "ha">{steps}'.encode(), "j")


def directory(count, entry):
    """EXIF of this many entries."""
    entries = b"".join(entry(i) for i in range(count))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + bytes(4)


HOSTILE = {
    "entities that grow": lambda: with_xmp(entities()),
    "an entity from elsewhere": lambda: with_xmp(typed(b'<!ENTITY a SYSTEM "file:///etc/passwd">')),
    "ten megabytes of text": lambda: png(chunk(b"tEXt", b"parameters\0" + b"Steps: 2" * 1_200_000)),
    "ten megabytes of a prompt": lambda: png(
        chunk(b"iTXt", b"prompt\0\0\0\0\0" + b'"class_type"  ' * 700_000)
    ),
    "text that unpacks to a megabyte, fifty times": lambda: texts(
        True, **{f"k{i}": " " * 1_000_000 for i in range(50)}, parameters="Steps: " * 140_000
    ),
    "ten megabytes of software": lambda: png(chunk(b"tEXt", b"Software\0" + b"dall-" * 1_900_000)),
    "ten megabytes of XMP": lambda: with_xmp(packet("<a/>" * 2_400_000), "PNG"),
    "XMP nested a million deep": lambda: with_xmp(packet("<a>" * 1_000_000), "PNG"),
    "XMP of one long attribute": lambda: with_xmp(packet(xmp__CreatorTool="x" * 9_000_000), "PNG"),
    "XMP of a million attributes": lambda: with_xmp(
        packet("<a " + " ".join(f'b{i}="1"' for i in range(700_000)) + "/>"), "PNG"
    ),
    "XMP that is none": lambda: with_xmp(bytes(range(256)) * 200, "PNG"),
    "XMP of another encoding": lambda: with_xmp(
        packet(xmp__CreatorTool="x").decode().encode("utf-16"), "PNG"
    ),
    "EXIF whose parts point at each other": lambda: png(
        chunk(b"eXIf", directory(2, lambda i: struct.pack("<HHII", 0x8769 + i, LONG, 1, 8)))
    ),
    "EXIF whose next one is itself": lambda: png(
        chunk(
            b"eXIf",
            directory(1, lambda i: struct.pack("<HHII", 0x8769, LONG, 1, 8))[:-4] + b"\x08\0\0\0",
        )
    ),
    "EXIF of sixty thousand entries": lambda: png(
        chunk(b"eXIf", directory(60_000, lambda i: struct.pack("<HHII", 1 + i, 7, 4, 8)))
    ),
    "EXIF that points at its end, again and again": lambda: png(
        chunk(
            b"eXIf",
            directory(
                20_000,
                lambda i: struct.pack(
                    "<HHII", *((36864 + i, 7, 500_000, 8) if i else (0x8769, LONG, 1, 8))
                ),
            )
            + bytes(500_000),
        )
    ),
    "EXIF of millions of numbers": lambda: png(
        chunk(
            b"eXIf",
            directory(
                2,
                lambda i: struct.pack(
                    "<HHII", *((0x8769, LONG, 1, 8) if i else (0x0110, 3, 4_500_000, 38))
                ),
            )
            + bytes(9_000_000),
        )
    ),
    "a comment that is a number": lambda: png(
        chunk(
            b"eXIf", directory(2, lambda i: struct.pack("<HHII", (0x8769, 0x9286)[i], LONG, 1, 8))
        )
    ),
    "ten megabytes of IPTC": lambda: segments(
        0xED,
        b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", 65_000) + b"\x1c\2A\0\0" * 13_000,
    ),
    "IPTC in a TIFF": lambda: tiff(
        grid(8, 8, 1, t273=2000, t278=8, t279=64, t33723=(7, 65, b"\x1c\2A\0\0" * 13)), bytes(64)
    ),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_crafted_metadata_break_nothing(make, as_users_have_it):
    found = claims(make())
    assert len(found) <= 20
    assert all(len(name) <= LONGEST for _, _, name in found)
    assert "haha" not in str(found) and "root:" not in str(found)


def long_exif(size):
    """A PNG whose EXIF names a program before this many bytes."""
    data = Image.Exif()
    data[0x0131] = "GIMP"
    return png(chunk(b"eXIf", data.tobytes()[6:] + bytes(size)))


LONG_FIELDS = {  # the limit, and a function: size -> a file with a claim of or behind that size
    "EXIF": ("EXIF_BYTES", long_exif),
    "XMP": (
        "XMP_BYTES",
        lambda size: with_xmp(packet(" " * size + "<xmp:CreatorTool>x</xmp:CreatorTool>"), "PNG"),
    ),
    "text": ("MARK_CHARACTERS", lambda size: texts(parameters=" " * size + WEBUI)),
    "name": ("LONGEST", lambda size: texts(Software=" " * 4 * size + "GIMP")),
}


@pytest.mark.parametrize("limit, make", LONG_FIELDS.values(), ids=LONG_FIELDS)
def test_a_field_is_read_up_to_its_limit_because_reading_costs_time(limit, make):
    size = getattr(provenance, limit)
    assert len(claims(make(size // 2))) == 1
    assert claims(make(size)) == []


def test_iptc_in_a_tiff_is_not_read_because_pillow_would_read_it_byte_by_byte():
    record = b"\x1c\2A\0\4GIMP"
    data = tiff(grid(8, 8, 1, t273=2000, t278=8, t279=64, t33723=(7, 9, record)), bytes(64))
    assert claims(data) == []


def test_an_error_of_a_parser_gives_no_claim(monkeypatch):
    image = decoding.open_image(exif(t305="Midjourney"))
    monkeypatch.setattr(type(image), "getexif", lambda _: 1 / 0)
    assert read_metadata(image) == []


# ---- verdicts ----


@pytest.fixture(scope="module")
def client(compiled_once):
    return client_on()


def test_verdict_and_confidence_do_not_depend_on_metadata(client):
    plain = encode(picture(size=(300, 200)), "PNG")
    info, data = PngImagePlugin.PngInfo(), Image.Exif()
    info.add_text("parameters", WEBUI)
    data[271], data[305] = "Canon", "Midjourney"
    marked = encode(Image.open(io.BytesIO(plain)), "PNG", pnginfo=info, exif=data)
    bare, full = (upload(client, "/classify?details=1", file).json for file in (plain, marked))
    names = [claim["name"] for claim in full["provenance"]["metadata"]]
    assert names == ["Stable Diffusion web UI", "Midjourney", "Canon"]
    assert bare["provenance"]["metadata"] == []
    for name in set(bare) - {"provenance", "timings"}:
        assert bare[name] == full[name], name
    verdict = {name: full[name] for name in ("classification", "confidence")}
    for file in (plain, marked):
        assert upload(client, "/classify", file).json == verdict
    detector = Detector(BASELINE)
    assert detector.classify(plain) == detector.classify(marked)
    pixels = [detector.pixels(decoding.decode_image(file)) for file in (plain, marked)]
    assert np.array_equal(*pixels)


def test_provenance_is_read_only_for_details(client, monkeypatch):
    monkeypatch.setattr(provenance, "read_provenance", lambda *_: 1 / 0)
    assert upload(client, "/classify", encode(picture(), "PNG")).status_code == 200


def test_the_log_holds_no_provenance(client, caplog):
    caplog.set_level("INFO")
    upload(client, "/classify?details=1", texts(Software="Midjourney"))
    (line,) = lines(caplog, "verdict")
    assert "provenance" not in line and "Midjourney" not in json.dumps(line)


def test_each_image_of_a_batch_has_its_own_claims_and_a_broken_image_has_none(client):
    data = [texts(Software="Midjourney"), b"hello", exif(t272="X-T5")]
    results = upload(client, "/classify/batch?details=1", *data).json["results"]
    assert [result.get("provenance", {}).get("metadata") for result in results] == [
        [{"where": "PNG text 'Software'", "says": MADE, "name": "Midjourney"}],
        None,
        [{"where": "EXIF Make and Model", "says": TAKEN, "name": "X-T5"}],
    ]


def test_classify_py_reports_the_same(script, tmp_path, client):
    data, path = texts(Software="Midjourney"), tmp_path / "a.png"
    path.write_bytes(data)
    command = "classify.py", "--image_path", path, "--model_path", BASELINE, "--details"
    provenance = json.loads(script(*command, "--json").stdout)["provenance"]
    assert provenance == upload(client, "/classify?details=1", data).json["provenance"]
    line = script(*command).stdout.rstrip("\n")
    assert line.endswith(f"; provenance {in_words(provenance)}")


def test_without_c2pa_python_the_state_says_so_and_metadata_are_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "c2pa", None)
    data = texts(Software="Midjourney")
    assert read_provenance(decoding.open_image(data), data) == {
        "c2pa": {"state": "not looked for"},
        "metadata": [{"where": "PNG text 'Software'", "says": MADE, "name": "Midjourney"}],
    }


def test_the_page_and_the_openapi_document_name_every_state_and_every_claim():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    section = page.split("## Provenance in the file")[1].split("\n## ")[0]
    schemas = DOCUMENT["components"]["schemas"]
    assert schemas["Claim"]["properties"]["says"]["enum"] == [MADE, PARTLY, TAKEN, SAVED]
    assert schemas["Manifest"]["properties"]["says"]["enum"] == [MADE, PARTLY, TAKEN, None]
    assert set(SOURCE_TYPES.values()) == {MADE, PARTLY, TAKEN}
    for state in schemas["Manifest"]["properties"]["state"]["enum"]:
        assert f"`{state}`" in section
    for name in MARKS:
        assert name in section
    (example,) = re.findall(r"```json\n(.*?)```", section, re.DOTALL)
    assert faults(schemas["Provenance"], json.loads(example)) == []
    for wrong in (
        {"c2pa": {"state": "none"}},
        {"c2pa": {"state": "fine"}, "metadata": []},
        {"c2pa": {}, "metadata": []},
    ):
        assert faults(schemas["Provenance"], wrong)
