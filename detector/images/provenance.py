"""What a file says of its own making: marks of generators and cameras in its metadata, and a C2PA manifest.

    image = open_image(data)
    rgb = load_rgb(image)
    read_provenance(image, data)     # {"c2pa": {"state": "none"}, "metadata": [{"where": ..., "says": ..., "name": ...}]}

All of it is claims: whoever has the file can write them or remove them, so no verdict is made of them. Only what names the
software or the device is reported, never a prompt. Nothing is decoded again, nothing is fetched, nothing here raises.
"""

import io
import json
import re
import time
from contextlib import suppress
from itertools import islice
from xml.parsers import expat

from PIL import IptcImagePlugin

MADE, PARTLY, TAKEN, SAVED = (
    "made by a generator",
    "made in part by a generator",
    "taken by a camera",
    "saved by software",
)
LONGEST = 200  # characters of a text that is reported
MARK_CHARACTERS = 100_000  # of a text that are looked through: prompts and node graphs are shorter, crafted ones are not
EXIF_BYTES = (
    1_000_000  # beyond which EXIF is not read: nine megabytes of numbers would take a second
)
XMP_BYTES = 500_000  # of XMP that are parsed: a tenth of a second where it is nothing but tags
MAX_BOXES = 2000  # JUMBF boxes in a C2PA store, some eight a manifest: 200 manifests take a third of a second
MAX_SEGMENTS = 1000  # of a JPEG, 64 kB each, that a store is cut into
MAX_REPORT = 4_000_000  # characters of a C2PA report
MAX_READ_S = 0.5  # processor time in which a C2PA reader may still read: a million empty chunks would take 11 seconds

# https://cv.iptc.org/newscodes/digitalsourcetype/ (C2PA and XMP use the same terms)
SOURCE_TYPES = {
    "trainedAlgorithmicMedia": MADE,
    "compositeWithTrainedAlgorithmicMedia": PARTLY,
    "compositeSynthetic": PARTLY,
    "digitalCapture": TAKEN,
    "computationalCapture": TAKEN,
}
# what generators write beside a prompt; each pattern is of the first program that wrote so, and others write the same
MARKS = {
    "Stable Diffusion web UI": r"\bSteps: \d+, ",
    "ComfyUI": r'\A(prompt|workflow):\s*\{|"class_type"\s*:|"last_node_id"\s*:',
    "NovelAI": r'"NovelAI|\bNovelAI Diffusion\b|"uc"\s*:',
    "Midjourney": r"\bJob ID: [0-9a-f]{8}-",
}
PNG_TEXTS = ("parameters", "prompt", "workflow", "Comment", "Description", "Source")
INVOKEAI = (
    "invokeai_metadata",
    "invokeai_graph",
    "invokeai_workflow",
    "sd-metadata",
    "Dream",
)  # that they are there is enough
GENERATORS = re.compile(
    r"\b(stable.?diffusion|midjourney|dall[-·•]e|novelai|comfyui|invokeai|fooocus|swarmui|automatic1111|sd\.next|draw"
    r" things|dreamstudio"
    r"|adobe firefly|firefly image|google ai|imagen \d|ideogram|chatgpt|openai|gpt.image|black"
    r" forest labs|flux\.1|leonardo\.?ai"
    r"|meta ai|imagined with ai|bing image creator|grok imagine|recraft|ai.generated)\b",
    re.IGNORECASE,
)
XMP = {
    "http://ns.adobe.com/xap/1.0/ CreatorTool": "CreatorTool",
    "http://ns.adobe.com/photoshop/1.0/ Credit": "Credit",
    "http://iptc.org/std/Iptc4xmpExt/2008-02-29/ DigitalSourceType": "DigitalSourceType",
    "http://iptc.org/std/Iptc4xmpExt/2008-02-29/ AISystemUsed": "AISystemUsed",
}
RESOURCE = "http://www.w3.org/1999/02/22-rdf-syntax-ns# resource"
C2PA_TYPES = {
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "AVIF": "image/avif",
    "HEIF": "image/heif",
    "TIFF": "image/tiff",
}
# no network: no manifest from elsewhere, no revocation list, no identity documents
C2PA_SETTINGS = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "core": {"allowed_network_hosts": [], "decode_identity_assertions": False},
}
JUMBF_TYPE = bytes.fromhex(
    "00110010800000aa00389b71"
)  # how the type of every box in a store ends (ISO 19566-5)


def read_provenance(image, data):
    """A decoded image from `decoding.open_image` and its bytes -> {'c2pa': ..., 'metadata': [...]}.

    `c2pa`: `state` alone ('none'; 'elsewhere': named by an address, which is not asked; 'unreadable'; 'not looked for': c2pa-python
    is not installed, or not of this format), or with it what a manifest says; see `manifest_says`. `metadata`: a dict of where,
    says, name for each claim, in a fixed order, 20 at most.
    """
    return {"c2pa": read_c2pa(image, data), "metadata": read_metadata(image)}


def in_words(found):
    """What `read_provenance` gave -> one line."""
    c2pa = found["c2pa"]
    words = [
        f"C2PA {c2pa['state']}",
        c2pa.get("says"),
        c2pa.get("signer") and f"signed by {c2pa['signer']}",
        c2pa.get("claim_generator") and f"with {c2pa['claim_generator']}",
    ]
    words += [f"{claim['where']}: {claim['says']} ({claim['name']})" for claim in found["metadata"]]
    return ", ".join(word for word in words if word)


def clean(value):
    """Text or bytes of a file -> one line of at most LONGEST printable characters; '' for everything else."""
    text = value[: 4 * LONGEST].decode(errors="replace") if isinstance(value, bytes) else value
    text = text[: 4 * LONGEST] if isinstance(text, str) else ""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:LONGEST]


# ---- metadata ----


def read_metadata(image):
    """-> [{'where': ..., 'says': ..., 'name': ...}]; what cannot be read says nothing."""
    found = []
    for read in (png_claims, exif_claims, xmp_claims, iptc_claims):
        with suppress(Exception):  # Pillow's parsers raise almost anything on crafted bytes
            found.extend(
                {"where": where, "says": says, "name": name}
                for where, says, name in read(image)
                if name
            )
    return found


def mark_of(text):
    """The generator that writes such a text beside a prompt, or None."""
    text = text[:MARK_CHARACTERS] if isinstance(text, str) else ""
    return next((name for name, pattern in MARKS.items() if re.search(pattern, text)), None)


def software(where, value):
    """A field that names what saved the file -> (where, says, name)."""
    name = clean(value)
    return where, MADE if GENERATORS.search(name) else SAVED, name


def credit(where, value):
    """A field that names a person or an agency, which is nobody's business here, or a generator."""
    name = clean(value)
    return where, MADE, name if GENERATORS.search(name) else None


def png_claims(image):
    if image.format != "PNG":
        return
    for key in PNG_TEXTS:
        yield f"PNG text '{key}'", MADE, mark_of(image.info.get(key))
    for key in INVOKEAI:
        yield f"PNG text '{key}'", MADE, "InvokeAI" if key in image.info else None
    yield software("PNG text 'Software'", image.info.get("Software"))


def exif_claims(image):
    if len(image.info.get("exif", b"")) > EXIF_BYTES:
        return
    exif = image.getexif()
    yield software("EXIF Software", exif.get(0x0131))
    make, model = clean(exif.get(0x010F)), clean(exif.get(0x0110))
    graph = mark_of(exif.get(0x010F)) or mark_of(exif.get(0x0110))  # ComfyUI puts its own there
    device = model if model.startswith(make) else f"{make} {model}".strip()
    yield (
        "EXIF Make and Model",
        MADE if graph or GENERATORS.search(device) else TAKEN,
        graph or device[:LONGEST],
    )
    yield "EXIF ImageDescription", MADE, mark_of(exif.get(0x010E))
    yield "EXIF UserComment", MADE, mark_of(user_comment(exif.get_ifd(0x8769).get(0x9286)))


def user_comment(value):
    """EXIF UserComment: eight bytes that name the encoding, then the text. (Both byte orders of UTF-16 are in use.)"""
    if not isinstance(value, bytes):
        return value
    head, body = value[:8], value[8 : 2 * MARK_CHARACTERS]
    if head != b"UNICODE\0":
        return body.decode(errors="replace")
    return body.decode("utf-16-be" if body[:1] == b"\0" else "utf-16-le", errors="replace")


def xmp_claims(image):
    found = xmp_values(image.info.get("xmp", b""))
    term = clean(found.get("DigitalSourceType")).rstrip("/").rsplit("/", 1)[-1]
    yield "XMP DigitalSourceType", SOURCE_TYPES.get(term), term if term in SOURCE_TYPES else None
    yield "XMP AISystemUsed", MADE, clean(found.get("AISystemUsed"))
    yield software("XMP CreatorTool", found.get("CreatorTool"))
    yield credit("XMP Credit", found.get("Credit"))


def xmp_values(packet):
    """XMP -> {name: text} of the properties in XMP, attributes or elements. One with a document type, where entities are
    declared, ends there; so does one that is no XML."""
    found, inside = {}, [None]

    def start(tag, attributes):
        inside.append(XMP.get(tag, inside[-1]))
        for name, value in attributes.items():
            name = inside[-1] if name == RESOURCE else XMP.get(name)
            if name:
                found.setdefault(name, value[:LONGEST])

    def text(part):
        if inside[-1] and len(found.get(inside[-1], "")) < LONGEST:
            found[inside[-1]] = found.get(inside[-1], "") + part.strip()[:LONGEST]

    def refuse(*_):
        raise ValueError("XMP has no document type")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler, parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = (
        start,
        text,
        refuse,
    )
    parser.EndElementHandler = lambda _: inside.pop()
    with suppress(expat.ExpatError, ValueError):
        parser.Parse(
            packet[:XMP_BYTES], False
        )  # not to the end: one that is cut off keeps what was found
    return found


def iptc_claims(image):
    if image.format not in ("JPEG", "MPO"):  # in a TIFF Pillow would read megabytes, byte by byte
        return
    found = IptcImagePlugin.getiptcinfo(image) or {}
    yield software("IPTC OriginatingProgram", found.get((2, 65)))
    yield credit("IPTC Credit", found.get((2, 110)))


# ---- C2PA ----


class Metered(io.BytesIO):
    """Bytes that this thread may read for so long, by the time that it computes. c2pa-python asks nothing but `readinto`."""

    def __init__(self, data):
        super().__init__(data)
        self.end = time.thread_time() + MAX_READ_S

    def readinto(self, buffer):
        if time.thread_time() > self.end:
            raise TimeoutError
        return super().readinto(buffer)


def read_c2pa(image, data):
    try:
        import c2pa
    except (ImportError, RuntimeError):  # not installed, or without its native library
        return {"state": "not looked for"}
    if image.format not in C2PA_TYPES:
        return {"state": "not looked for"}
    if too_costly(image.format, data):
        return {"state": "unreadable"}
    try:
        context = c2pa.Context.from_dict(C2PA_SETTINGS)
        with (
            context,
            c2pa.Reader(C2PA_TYPES[image.format], Metered(data), context=context) as reader,
        ):
            report = reader.json()
        return (
            manifest_says(json.loads(report))
            if len(report) <= MAX_REPORT
            else {"state": "unreadable"}
        )
    except c2pa.C2paError.ManifestNotFound:
        return {"state": "none"}
    except Exception as error:  # a crafted report may be of any shape
        return {"state": "elsewhere" if str(error).startswith("Remote: ") else "unreadable"}


def too_costly(kind, data):
    """Has it a store of very many boxes, or one to be unpacked? Each manifest has its signature checked, and a few hundred bytes
    may unpack to many megabytes."""
    stored = data
    if kind in (
        "JPEG",
        "MPO",
    ):  # cut into segments with heads of 20 bytes, which may hide what is looked for
        most = (
            MAX_SEGMENTS + len(data) // 20_000
        )  # in pixels, or a film behind them, their marker comes by chance
        starts = [found.start() for found in islice(re.finditer(rb"\xff\xeb", data), most + 1)]
        spans = [(at + 20, at + 2 + int.from_bytes(data[at + 2 : at + 4])) for at in starts]
        if len(spans) > most or sum(end - start for start, end in spans) > 2 * len(data):
            return True
        stored = b"".join(data[start:end] for start, end in spans)
    boxes = stored.count(JUMBF_TYPE)
    return boxes > MAX_BOXES or boxes > 0 and b"brob" in stored


def manifest_says(report):
    """c2pa-python's report -> dict: `state` ('valid': the file is as it was signed, by whomever; 'trusted': and a list vouches for
    the signer, of which none is set here; 'invalid'), `failures`: C2PA's codes; `says`: made by a generator, made in part by one,
    taken by a camera, or None; `signer`, `claim_generator`: names as the manifest has them."""
    manifest = report["manifests"][report["active_manifest"]]
    signature, claims = (
        manifest.get("signature_info") or {},
        manifest.get("claim_generator_info") or [{}],
    )
    types = {term for ancestor in lineage(report) for term in source_types(ancestor)}
    failures = {clean(status.get("code")) for status in report.get("validation_status") or ()}
    generator = (
        f"{claims[0].get('name', '')} {claims[0].get('version', '')}".strip()
        or manifest.get("claim_generator")
    )
    return {
        "state": report["validation_state"].lower(),
        "failures": sorted(failures)[:10],
        "says": next((SOURCE_TYPES[term] for term in SOURCE_TYPES if term in types), None),
        "signer": clean(signature.get("issuer") or signature.get("common_name")) or None,
        "claim_generator": clean(generator) or None,
    }


def lineage(report):
    """The active manifest, that of the file which it was made from, and so on: an edited picture is told by its parent's."""
    label, found = report["active_manifest"], {}
    while label in report["manifests"] and label not in found:
        found[label] = report["manifests"][label]
        label = next(
            (
                part.get("active_manifest")
                for part in found[label].get("ingredients") or ()
                if part.get("relationship") == "parentOf"
            ),
            None,
        )
    return found.values()


def source_types(manifest):
    """Terms of IPTC that a manifest's actions, or its own metadata, give for the source of the picture."""
    for assertion in manifest.get("assertions") or ():
        content = assertion.get("data")
        if isinstance(content, dict):
            actions = (
                content.get("actions") or ()
                if assertion["label"].startswith("c2pa.actions")
                else ()
            )
            for source in (
                *(action.get("digitalSourceType") for action in actions),
                content.get("Iptc4xmpExt:DigitalSourceType"),
            ):
                yield clean(source).rstrip("/").rsplit("/", 1)[-1]
