"""Claims of a file about its origin: marks of generators and cameras, and a C2PA manifest.

    image = open_image(data)
    rgb = load_rgb(image)
    read_provenance(image, data)     # {"c2pa": {"state": "none"},
                                     #  "metadata": [{"where": ..., "says": ..., "name": ...}]}

Anyone can write or remove these claims, so no verdict uses them. Only names of software and
devices are reported, never a prompt. Nothing is decoded again. Nothing is fetched. Nothing raises.
"""

import io
import json
import re
import time
from contextlib import suppress
from itertools import islice
from xml.parsers import expat

from PIL import IptcImagePlugin

MADE = "made by a generator"
PARTLY = "made in part by a generator"
TAKEN = "taken by a camera"
SAVED = "saved by software"
LONGEST = 200  # characters of a reported text
MARK_CHARACTERS = 100_000  # of a text that are searched; prompts and node graphs are shorter
EXIF_BYTES = 1_000_000  # longer EXIF is not read; nine megabytes of numbers take a second
XMP_BYTES = 500_000  # of XMP that are parsed; if all are tags, they take a tenth of a second
MAX_BOXES = 2000  # JUMBF boxes in a C2PA store: 200 manifests, a third of a second
MAX_SEGMENTS = 1000  # of a JPEG, 64 kB each, that hold a store
MAX_REPORT = 4_000_000  # characters of a C2PA report
MAX_READ_S = 0.5  # processor time for C2PA's reads; a million empty chunks would take 11 seconds

# https://cv.iptc.org/newscodes/digitalsourcetype/ (C2PA and XMP use the same terms)
SOURCE_TYPES = {
    "trainedAlgorithmicMedia": MADE,
    "compositeWithTrainedAlgorithmicMedia": PARTLY,
    "compositeSynthetic": PARTLY,
    "digitalCapture": TAKEN,
    "computationalCapture": TAKEN,
}
# Texts that generators write beside a prompt. Other programs have copied these formats.
MARKS = {
    "Stable Diffusion web UI": r"\bSteps: \d+, ",
    "ComfyUI": r'\A(prompt|workflow):\s*\{|"class_type"\s*:|"last_node_id"\s*:',
    "NovelAI": r'"NovelAI|\bNovelAI Diffusion\b|"uc"\s*:',
    "Midjourney": r"\bJob ID: [0-9a-f]{8}-",
}
PNG_TEXTS = ("parameters", "prompt", "workflow", "Comment", "Description", "Source")
# InvokeAI's keys; the value does not matter
INVOKEAI = ("invokeai_metadata", "invokeai_graph", "invokeai_workflow", "sd-metadata", "Dream")
GENERATORS = re.compile(
    r"\b(stable.?diffusion|midjourney|dall[-·•]e|novelai|comfyui|invokeai|fooocus|swarmui"
    r"|automatic1111|sd\.next|draw things|dreamstudio|adobe firefly|firefly image|google ai"
    r"|imagen \d|ideogram|chatgpt|openai|gpt.image|black forest labs|flux\.1|leonardo\.?ai"
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
# no network: no remote manifest, no revocation list, no identity documents
C2PA_SETTINGS = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "core": {"allowed_network_hosts": [], "decode_identity_assertions": False},
}
# end of the type of every box in a store (ISO 19566-5)
JUMBF_TYPE = bytes.fromhex("00110010800000aa00389b71")
UNREADABLE, NOT_LOOKED_FOR = "unreadable", "not looked for"


def read_provenance(image, data):
    """A decoded image from `decoding.open_image` and its bytes -> {'c2pa': ..., 'metadata': [...]}.

    `c2pa` holds `state`, and the fields of `manifest_claims` where there is a manifest. States
    without a manifest: 'none', 'unreadable', 'elsewhere' (an address, which is not fetched), 'not
    looked for' (c2pa-python is not installed, or does not read this format).
    `metadata` lists at most 20 claims in a fixed order.
    """
    return {"c2pa": read_c2pa(image, data), "metadata": read_metadata(image)}


def in_words(provenance):
    """Result of `read_provenance` -> one line."""
    c2pa = provenance["c2pa"]
    parts = [
        f"C2PA {c2pa['state']}",
        c2pa.get("says"),
        c2pa.get("signer") and f"signed by {c2pa['signer']}",
        c2pa.get("claim_generator") and f"with {c2pa['claim_generator']}",
        *(
            f"{claim['where']}: {claim['says']} ({claim['name']})"
            for claim in provenance["metadata"]
        ),
    ]
    return ", ".join(filter(None, parts))


def clean(value):
    """Text or bytes of a file -> one line of at most LONGEST printable characters.

    '' for other types.
    """
    text = value[: 4 * LONGEST].decode(errors="replace") if isinstance(value, bytes) else value
    text = text[: 4 * LONGEST] if isinstance(text, str) else ""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:LONGEST]


# ---- metadata ----


def read_metadata(image):
    """-> [{'where': ..., 'says': ..., 'name': ...}], without the fields that cannot be read."""
    claims = []
    for read in (png_claims, exif_claims, xmp_claims, iptc_claims):
        with suppress(Exception):  # Pillow's parsers raise almost anything on crafted bytes
            claims.extend(
                {"where": where, "says": says, "name": name}
                for where, says, name in read(image)
                if name
            )
    return claims


def mark_of(text):
    """The generator that writes a text in this form, or None."""
    text = text[:MARK_CHARACTERS] if isinstance(text, str) else ""
    return next((name for name, pattern in MARKS.items() if re.search(pattern, text)), None)


def software(where, value):
    """A field that names the program that saved the file -> (where, says, name)."""
    name = clean(value)
    return where, MADE if GENERATORS.search(name) else SAVED, name


def credit(where, value):
    """A field that names a person, an agency or a generator. Only generators are reported."""
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
    graph = mark_of(exif.get(0x010F)) or mark_of(exif.get(0x0110))  # of ComfyUI
    device = model if model.startswith(make) else f"{make} {model}".strip()
    says = MADE if graph or GENERATORS.search(device) else TAKEN
    yield "EXIF Make and Model", says, graph or device[:LONGEST]
    yield "EXIF ImageDescription", MADE, mark_of(exif.get(0x010E))
    yield "EXIF UserComment", MADE, mark_of(user_comment(exif.get_ifd(0x8769).get(0x9286)))


def user_comment(value):
    """EXIF UserComment, eight bytes that name the encoding and a text -> text.

    Programs write both byte orders of UTF-16.
    """
    if not isinstance(value, bytes):
        return value
    head, body = value[:8], value[8 : 2 * MARK_CHARACTERS]
    if head != b"UNICODE\0":
        return body.decode(errors="replace")
    return body.decode("utf-16-be" if body[:1] == b"\0" else "utf-16-le", errors="replace")


def xmp_claims(image):
    values = xmp_values(image.info.get("xmp", b""))
    term = last_part(values.get("DigitalSourceType"))
    yield "XMP DigitalSourceType", SOURCE_TYPES.get(term), term if term in SOURCE_TYPES else None
    yield "XMP AISystemUsed", MADE, clean(values.get("AISystemUsed"))
    yield software("XMP CreatorTool", values.get("CreatorTool"))
    yield credit("XMP Credit", values.get("Credit"))


def last_part(address):
    """Address of an IPTC term -> term."""
    return clean(address).rstrip("/").rsplit("/", 1)[-1]


def xmp_values(packet):
    """XMP packet -> {name: text} of the properties in XMP, attributes or elements.

    Parsing ends at a document type, because it may declare entities, and at invalid XML.
    """
    values, inside = {}, [None]

    def start(tag, attributes):
        inside.append(XMP.get(tag, inside[-1]))
        for name, value in attributes.items():
            name = inside[-1] if name == RESOURCE else XMP.get(name)
            if name:
                values.setdefault(name, value[:LONGEST])

    def text(part):
        value = values.get(inside[-1], "")
        if inside[-1] and len(value) < LONGEST:
            values[inside[-1]] = value + part.strip()[:LONGEST]

    def refuse(*_):
        raise ValueError("XMP has no document type")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: inside.pop()
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    with suppress(expat.ExpatError, ValueError):
        parser.Parse(packet[:XMP_BYTES], False)  # False: the packet may be cut off
    return values


def iptc_claims(image):
    if image.format not in ("JPEG", "MPO"):  # in a TIFF Pillow would read megabytes bytewise
        return
    records = IptcImagePlugin.getiptcinfo(image) or {}
    yield software("IPTC OriginatingProgram", records.get((2, 65)))
    yield credit("IPTC Credit", records.get((2, 110)))


# ---- C2PA ----


class Metered(io.BytesIO):
    """Bytes that this thread may read for MAX_READ_S of processor time.

    c2pa-python reads with `readinto` only.
    """

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
        return {"state": NOT_LOOKED_FOR}
    if image.format not in C2PA_TYPES:
        return {"state": NOT_LOOKED_FOR}
    if too_costly(image.format, data):
        return {"state": UNREADABLE}
    kind = C2PA_TYPES[image.format]
    try:
        with (
            c2pa.Context.from_dict(C2PA_SETTINGS) as context,
            c2pa.Reader(kind, Metered(data), context=context) as reader,
        ):
            report = reader.json()
        if len(report) > MAX_REPORT:
            return {"state": UNREADABLE}
        return manifest_claims(json.loads(report))
    except c2pa.C2paError.ManifestNotFound:
        return {"state": "none"}
    except Exception as error:  # a crafted report may be of any shape
        return {"state": "elsewhere" if str(error).startswith("Remote: ") else UNREADABLE}


def too_costly(kind, data):
    """Has it a store of very many boxes, or a compressed store?

    c2pa-python checks the signature of each manifest. A few hundred bytes may unpack to megabytes.
    """
    stored = data
    if kind in ("JPEG", "MPO"):  # segments with headers of 20 bytes, which may cut a box's type
        # pixels, and a film behind them, hold the marker by chance
        most = MAX_SEGMENTS + len(data) // 20_000
        starts = [match.start() for match in islice(re.finditer(rb"\xff\xeb", data), most + 1)]
        spans = [(at + 20, at + 2 + int.from_bytes(data[at + 2 : at + 4])) for at in starts]
        if len(spans) > most or sum(end - start for start, end in spans) > 2 * len(data):
            return True
        stored = b"".join(data[start:end] for start, end in spans)
    boxes = stored.count(JUMBF_TYPE)
    return boxes > MAX_BOXES or boxes > 0 and b"brob" in stored


def manifest_claims(report):
    """c2pa-python's report -> {'state', 'failures', 'says', 'signer', 'claim_generator'}.

    `state` is 'valid' (no change since the signature, by any signer), 'trusted' (a list vouches
    for the signer; we set no list) or 'invalid'. `failures` are C2PA's codes. `says` is MADE,
    PARTLY, TAKEN or None. `signer` and `claim_generator` are names in the manifest.
    """
    manifest = report["manifests"][report["active_manifest"]]
    signature = manifest.get("signature_info") or {}
    program = (manifest.get("claim_generator_info") or [{}])[0]
    types = {term for ancestor in lineage(report) for term in source_types(ancestor)}
    failures = {clean(status.get("code")) for status in report.get("validation_status") or ()}
    generator = f"{program.get('name', '')} {program.get('version', '')}".strip()
    return {
        "state": report["validation_state"].lower(),
        "failures": sorted(failures)[:10],
        "says": next((SOURCE_TYPES[term] for term in SOURCE_TYPES if term in types), None),
        "signer": clean(signature.get("issuer") or signature.get("common_name")) or None,
        "claim_generator": clean(generator or manifest.get("claim_generator")) or None,
    }


def lineage(report):
    """The active manifest, the manifest of its parent file, and so on.

    The source type of an edited picture stands in its parent's manifest.
    """
    label, manifests = report["active_manifest"], {}
    while label in report["manifests"] and label not in manifests:
        manifests[label] = report["manifests"][label]
        ingredients = manifests[label].get("ingredients") or ()
        parents = (part for part in ingredients if part.get("relationship") == "parentOf")
        label = next(parents, {}).get("active_manifest")
    return manifests.values()


def source_types(manifest):
    """IPTC terms for the source of the picture, from a manifest's actions and its metadata."""
    for assertion in manifest.get("assertions") or ():
        content = assertion.get("data")
        if isinstance(content, dict):
            if assertion["label"].startswith("c2pa.actions"):
                for action in content.get("actions") or ():
                    yield last_part(action.get("digitalSourceType"))
            yield last_part(content.get("Iptc4xmpExt:DigitalSourceType"))
