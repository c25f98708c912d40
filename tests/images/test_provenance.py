"""What a file's metadata says of its making: every field that is looked at, what is not told, what crafted ones cost."""

import io
import json
import re
import struct

import numpy as np
import pytest
from commands import ROOT
from crafted import LONG, grid, png, segments, tiff
from engines import client_on, lines, upload
from made_up import BASELINE
from openapi_document import DOCUMENT, faults
from patience import costs_at_most
from PIL import Image, PngImagePlugin
from test_decoding import chunk, picture, saved

from detector.images import decoding
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
    """Bytes -> [(where, says, name)], read as on the way to a verdict, pixels first."""
    image = decoding.open_image(data)
    decoding.load_rgb(image)
    return [tuple(claim.values()) for claim in read_metadata(image)]


def texts(compressed=False, international=False, **fields):
    """A PNG with these text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in fields.items():
        (info.add_itxt if international else info.add_text)(
            key.replace("_", "-") if key == "sd_metadata" else key, value, zip=compressed
        )
    return saved(picture(), "PNG", pnginfo=info)


def exif(kind="JPEG", comment=None, **tags):
    """A file with EXIF: {'t305': value}, and a UserComment."""
    found = Image.Exif()
    found.update({int(tag[1:]): value for tag, value in tags.items()})
    if comment is not None:
        found.get_ifd(0x8769)[0x9286] = comment
    return saved(picture(), kind, exif=found.tobytes())


def packet(inside="", **attributes):
    named = " ".join(f'{name.replace("__", ":")}="{value}"' for name, value in attributes.items())
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta'
        ' xmlns:x="adobe:ns:meta/"><rdf:RDF'
        ' xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
        f' {NAMESPACES} {named}>{inside}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def typed(declared, entity="a"):
    """XMP with a document type that declares these entities, and one of them as the creator tool."""
    return (
        b"<!DOCTYPE x ["
        + declared
        + b"]>"
        + packet(f"<xmp:CreatorTool>&{entity};</xmp:CreatorTool>").partition(b"?>")[2]
    )


def with_xmp(xmp, kind="JPEG"):
    if kind == "PNG":
        return png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    return saved(picture(), kind, **({"tiffinfo": {700: xmp}} if kind == "TIFF" else {"xmp": xmp}))


def iptc(**records):
    """A JPEG with IPTC-IIM in Photoshop's resource 0x0404: {'r110': bytes}."""
    body = b"".join(
        b"\x1c\2" + bytes([int(name[1:])]) + struct.pack(">H", len(value)) + value
        for name, value in records.items()
    )
    resource = (
        b"Photoshop 3.0\x008BIM\x04\x04\0\0"
        + struct.pack(">I", len(body))
        + body
        + b"\0" * (len(body) & 1)
    )
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
        lambda: saved(picture(), "TIFF", tiffinfo={305: "Capture One"}),
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


@pytest.mark.parametrize("what", FIELDS)
def test_each_field_is_told_with_its_place_and_without_the_prompt(what):
    make, *expected = FIELDS[what]
    assert claims(make()) == [tuple(expected)]


@pytest.mark.parametrize("international", [False, True])
def test_a_workflow_of_megabytes_is_told_like_a_short_one(international):
    workflow = json.dumps(
        {
            "last_node_id": 9,
            "nodes": [{"id": i, "widgets_values": ["a secret garden"]} for i in range(60_000)],
        }
    )
    assert len(workflow) > 2_000_000
    assert claims(texts(True, international, workflow=workflow)) == [
        ("PNG text 'workflow'", MADE, "ComfyUI")
    ]


def test_a_text_with_a_wrong_checksum_is_told():
    data = png(chunk(b"tEXt", b"parameters\0" + WEBUI.encode("latin-1"), checksum=12345))
    assert claims(data) == [("PNG text 'parameters'", MADE, "Stable Diffusion web UI")]


def test_several_are_told_in_a_fixed_order():
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
    "nothing": lambda: saved(picture(), "PNG"),
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
            saved(picture(), "JPEG")
            + b"parameters\0"
            + WEBUI.encode()
            + packet(xmp__CreatorTool="Midjourney")
        )
    ),
    "a string behind a PNG": (
        lambda: saved(picture(), "PNG") + chunk(b"tEXt", b"parameters\0" + WEBUI.encode())
    ),
    "a comment of a JPEG": lambda: saved(
        picture(), "JPEG", comment="Midjourney Job ID: 5c1b3b6e-0000"
    ),
    "a PNG's key in a WebP": lambda: saved(picture(), "WEBP") + b"parameters\0" + WEBUI.encode(),
}


@pytest.mark.parametrize("what", ORDINARY)
def test_of_what_says_nothing_of_a_generator_nothing_is_told(what):
    assert claims(ORDINARY[what]()) == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_was_stripped_by_saving_anew_is_gone(kind):
    marked = exif(kind, b"ASCII\0\0\0" + WEBUI.encode(), t305="Midjourney")
    assert len(claims(marked)) == 2
    again = Image.open(io.BytesIO(marked)).convert("RGB")
    again.info = {}
    assert claims(saved(again, kind)) == []


def test_names_are_one_printable_line_of_two_hundred_characters():
    assert (
        clean("a\x1b[31m\n b\u202egpj\0\x85c\ud800") == "a [31m b gpj c"
        and clean(b"caf\xc3\xa9\xff") == "caf\u00e9\ufffd"
    )
    assert (
        len(clean("x" * 10_000_000)) == LONGEST
        and [clean(value) for value in (None, 7, (1, 2), {})] == [""] * 4
    )
    ((_, _, name),) = claims(texts(Software="e\x1b[2J" + "vil " * 1000))
    assert len(name) <= LONGEST and name.isprintable() and name.startswith("e [2Jvil")


def test_a_telephone_s_jpeg_of_two_pictures_is_read_like_any_other():
    found = Image.Exif()
    found[272] = "Pixel 9"
    assert claims(
        saved(picture(), "MPO", save_all=True, append_images=[picture()], exif=found)
    ) == [("EXIF Make and Model", TAKEN, "Pixel 9")]


def test_in_words_it_is_one_line():
    found = {
        "c2pa": {
            "state": "valid",
            "failures": [],
            "says": MADE,
            "signer": "A",
            "claim_generator": "B 1",
        },
        "metadata": [{"where": "EXIF Software", "says": SAVED, "name": "C"}],
    }
    assert (
        in_words(found)
        == "C2PA valid, made by a generator, signed by A, with B 1, EXIF Software: saved by"
        " software (C)"
    )
    assert in_words({"c2pa": {"state": "none"}, "metadata": []}) == "C2PA none"


# ---- crafted ----


def entities():
    """A billion laughs."""
    names = "abcdefghij"
    steps = "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip(names, names[1:]))
    return typed(f'<!ENTITY a "ha">{steps}'.encode(), "j")


def directory(count, entry):
    """EXIF of so many entries."""
    return (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", count)
        + b"".join(entry(i) for i in range(count))
        + bytes(4)
    )


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


@pytest.mark.parametrize("what", HOSTILE)
def test_crafted_metadata_costs_no_second_and_breaks_nothing(what, as_users_have_it):
    image = decoding.open_image(HOSTILE[what]())
    decoding.load_rgb(image)
    with costs_at_most(10):
        found = read_metadata(image)
    assert len(found) <= 20
    assert all(len(claim["name"]) <= LONGEST for claim in found)
    assert "haha" not in str(found) and "root:" not in str(found)


def test_what_a_parser_raises_says_nothing(monkeypatch):
    image = decoding.open_image(exif(t305="Midjourney"))
    monkeypatch.setattr(type(image), "getexif", lambda _: 1 / 0)
    assert read_metadata(image) == []


# ---- beside a verdict, never in it ----


@pytest.fixture(scope="module")
def client(compiled_once):
    return client_on()


def test_verdict_and_confidence_are_the_same_whatever_the_metadata_say(client):
    plain = saved(picture(size=(300, 200)), "PNG")
    image = Image.open(io.BytesIO(plain))
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", WEBUI)
    found = Image.Exif()
    found[271], found[305] = "Canon", "Midjourney"
    marked = saved(image, "PNG", pnginfo=info, exif=found)
    assert len(claims(marked)) == 3 and claims(plain) == []
    bare, full = (upload(client, "/classify?details=1", data).json for data in (plain, marked))
    assert bare["provenance"]["metadata"] == [] and [
        claim["name"] for claim in full["provenance"]["metadata"]
    ] == ["Stable Diffusion web UI", "Midjourney", "Canon"]
    for name in set(bare) - {"provenance", "timings"}:
        assert bare[name] == full[name], name
    assert (
        upload(client, "/classify", marked).json
        == upload(client, "/classify", plain).json
        == {name: full[name] for name in ("classification", "confidence")}
    )
    detector = Detector(BASELINE)
    assert detector.classify(plain) == detector.classify(marked)
    assert np.array_equal(
        *(detector.pixels(decoding.decode_image(data)) for data in (plain, marked))
    )


def test_nothing_is_read_where_no_details_are_asked_for(client, monkeypatch):
    from detector.images import provenance

    monkeypatch.setattr(provenance, "read_provenance", lambda *_: 1 / 0)
    assert upload(client, "/classify", saved(picture(), "PNG")).status_code == 200


def test_the_log_has_none_of_it(client, caplog):
    caplog.set_level("INFO")
    upload(client, "/classify?details=1", texts(Software="Midjourney"))
    (line,) = lines(caplog, "verdict")
    assert "provenance" not in line and "Midjourney" not in json.dumps(line)


def test_in_a_batch_each_has_its_own_and_a_broken_one_has_none(client):
    data = [texts(Software="Midjourney"), b"hello", exif(t272="X-T5")]
    found = upload(client, "/classify/batch?details=1", *data).json["results"]
    assert [result.get("provenance", {}).get("metadata") for result in found] == [
        [{"where": "PNG text 'Software'", "says": MADE, "name": "Midjourney"}],
        None,
        [{"where": "EXIF Make and Model", "says": TAKEN, "name": "X-T5"}],
    ]


def test_classify_py_tells_the_same(script, tmp_path, client):
    (tmp_path / "a.png").write_bytes(texts(Software="Midjourney"))
    asked = (
        "classify.py",
        "--image_path",
        tmp_path / "a.png",
        "--model_path",
        BASELINE,
        "--details",
    )
    found = json.loads(script(*asked, "--json").stdout)["provenance"]
    assert (
        found
        == upload(client, "/classify?details=1", (tmp_path / "a.png").read_bytes()).json[
            "provenance"
        ]
    )
    assert script(*asked).stdout.rstrip("\n").endswith(f"; provenance {in_words(found)}")


def test_where_c2pa_python_is_not_installed_that_is_said_and_all_else_works(monkeypatch):
    import sys

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
    for found in (
        {"c2pa": {"state": "none"}},
        {"c2pa": {"state": "fine"}, "metadata": []},
        {"c2pa": {}, "metadata": []},
    ):
        assert faults(schemas["Provenance"], found)
