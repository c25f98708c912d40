"""The images of an upload, read from a multipart form in memory.

images = read_images(request, most=16)     # [bytes], at least one; raises Refused in one line
"""

import io
import re

from werkzeug.sansio.multipart import Data, Field, File, MultipartDecoder, NeedData, State

from detector.model.file import is_text

# Of a text field, and of a part's headers. A megabyte of headers takes 200 MB once parsed.
FIELD_BYTES = 500_000
FIELD_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,32}")  # safe to repeat in a response and in the log
TORN = {
    State.PREAMBLE: "the boundary that Content-Type names is not in the body",
    State.PART: "the headers of a part are too long, or do not end",
}
NOT_CLOSED = "the form ends without its closing boundary, as a body that was cut off does"


class Refused(Exception):
    """A request that the route does not take; `status` is the HTTP status that fits."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Decoder(MultipartDecoder):
    """Takes file names of any charset, since nothing reads them."""

    def _parse_headers(self, data):
        return super()._parse_headers(bytes(data).decode(errors="replace").encode())


class Part(io.BytesIO):
    """One part of a form, in memory: no image is ever written to disk.

    `is_file`: the part has a file name.
    """

    def __init__(self, event):
        super().__init__()
        self.name, self.is_file = event.name or "", bool(getattr(event, "filename", None))

    def write(self, data):
        if self.name != "image" and not self.is_file and self.tell() + len(data) > FIELD_BYTES:
            raise Refused(
                413,
                f"the text field {shown(self.name)} is larger than the {FIELD_BYTES:,} bytes"
                " allowed",
            )
        return super().write(data)


def read_images(request, most):
    """Werkzeug's request -> bytes of each field `image`, with or without a file name.

    Raises Refused, and HTTPException where the body is too large or late.
    """
    try:
        parts = read_form(request.stream, boundary_of(request), most)
        images = [part for part in parts if part.name == "image"]
        check_images(images, parts)
    except Refused as error:
        if error.status != 400:
            raise
        raise Refused(
            400,
            f"{error}; send the image as a file in the multipart field 'image': curl -F image=@FILE"
            f" URL{request.url_rule.rule}",
        ) from None
    return [part.getvalue() for part in images]


def check_images(images, parts):
    """Raises Refused where no part is an image, or where an image is text without a file name."""
    if not parts:
        raise Refused(400, "the form is empty")
    if not images:
        names = ", ".join(sorted({shown(part.name) for part in parts}))
        raise Refused(400, f"the form has no field 'image', only {names}")
    for part in images:
        if not part.is_file and is_text(part.getvalue()):
            size = f"holds {part.tell():,} bytes of text" if part.tell() else "is empty"
            raise Refused(400, f"the field 'image' {size} and came without a file's name")


def boundary_of(request):
    """Bytes of the boundary between the parts of a request's form.

    Raises Refused where the request has no form.
    """
    if not request.content_length and "Transfer-Encoding" not in request.headers:
        raise Refused(400, "the request has no body")
    if not request.mimetype:
        raise Refused(400, "the body came without a Content-Type")
    if request.mimetype != "multipart/form-data":
        raise Refused(400, f"the body came as {request.mimetype[:60]!r}")
    boundary = request.mimetype_params.get("boundary", "")
    if not boundary:
        raise Refused(
            400,
            "'multipart/form-data' came without its boundary: leave the Content-Type to the client",
        )
    return boundary.encode("latin-1", "replace")  # WSGI decodes headers as Latin-1


def read_form(body, boundary, most):
    """Stream of a multipart form -> [Part].

    Raises Refused where the form is torn, or has more than `most` images and one more field.
    """
    decoder, parts = Decoder(boundary), []
    # The loop reads to the end, so that a body above the size limit is reported as too large.
    while data := body.read(1 << 16):
        if decoder.state is State.EPILOGUE or len(decoder.buffer) > FIELD_BYTES:
            continue
        decoder.receive_data(data)
        for event in events(decoder):
            if isinstance(event, (Field, File)):
                parts.append(Part(event))
                check_count(parts, most)
            elif isinstance(event, Data):
                parts[-1].write(event.data)
    if decoder.state is not State.EPILOGUE:
        raise Refused(400, TORN.get(decoder.state, NOT_CLOSED))
    return parts


def check_count(parts, most):
    """Raises Refused where there are too many parts."""
    if len(parts) > most + 1:
        only_images = all(part.name == "image" for part in parts)
        limit = f"{most} images" if only_images else f"{most + 1} fields"
        raise Refused(413, f"the form has more than {limit}: send fewer")


def events(decoder):
    """Yield what the bytes so far hold. Raises Refused."""
    try:
        while not isinstance(event := decoder.next_event(), NeedData):
            yield event
    except ValueError:
        raise Refused(400, "a part of the form has no Content-Disposition") from None


def shown(name):
    """A field's name, where it is safe to repeat."""
    return repr(name) if FIELD_NAME.fullmatch(name) else "one with another name"
