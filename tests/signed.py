"""C2PA files: our own certificate chain, signed pictures, and stores with faults."""

import datetime
import functools
import io
import struct

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID
from written import chunk

TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype/"
QUIET = {"verify": {"verify_after_sign": False}, "builder": {"thumbnail": {"enabled": False}}}


# ---- signing ----


def named(name):
    kinds = NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME
    return x509.Name([x509.NameAttribute(kind, name) for kind in kinds])


def certificate(name, key, issuer, issuer_key, authority, seconds, ocsp=None):
    """An x509 certificate with the fields that C2PA requires, of a signer or an authority."""
    now = datetime.datetime.now(datetime.UTC)
    use = dict.fromkeys(
        "content_commitment key_encipherment data_encipherment key_agreement encipher_only"
        " decipher_only".split(),
        False,
    )
    use |= {"digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority}
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(seconds=seconds))
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(x509.KeyUsage(**use), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    if not authority:
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
        )
    if ocsp:
        address = x509.UniformResourceIdentifier(ocsp)
        place = x509.AccessDescription(AuthorityInformationAccessOID.OCSP, address)
        builder = builder.add_extension(x509.AuthorityInformationAccess([place]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


@functools.cache
def chain(name, seconds, ocsp=None):
    """-> (PEM of a signer's certificate and its authority's, PEM of the signer's key)."""
    authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    pair = (
        certificate(name, key, "Test Authority", authority, False, seconds, ocsp),
        certificate("Test Authority", authority, "Test Authority", authority, True, 86400),
    )
    pem = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in pair)
    return pem, key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def add_ingredient(builder, relationship, mime, data):
    builder.add_ingredient({"title": "a", "relationship": relationship}, mime, io.BytesIO(data))


def sign(
    data,
    kind,
    term="trainedAlgorithmicMedia",
    actions=None,
    assertions=(),
    parent=None,
    others=(),
    remote=None,
    name="Test Studio",
    seconds=86400,
    ocsp=None,
):
    """Bytes of an image of this format, signed, with the source type `term`.

    With `parent` the image is an edit of that file. `others` are its ingredients. `remote` is an
    address that replaces the manifest. `ocsp` is the address of the certificate's status.
    """
    pem, key = chain(name, seconds, ocsp)
    actions = actions or [{"action": "c2pa.created", "digitalSourceType": TERMS + term}]
    created = [] if parent else [{"label": "c2pa.actions", "data": {"actions": actions}}]
    manifest = {
        "claim_generator_info": [{"name": "Test Generator", "version": "2.0"}],
        "assertions": [*created, *assertions],
    }
    out, mime = io.BytesIO(), f"image/{kind.lower()}"
    with (
        c2pa.Signer.from_info(c2pa.C2paSignerInfo("es256", pem, key, None)) as signer,
        c2pa.Builder(manifest, context=c2pa.Context.from_dict(QUIET)) as builder,
    ):
        if parent:
            builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
            add_ingredient(builder, "parentOf", mime, parent)
        for other in others:
            add_ingredient(builder, "componentOf", mime, other)
        if remote:
            builder.set_no_embed()
            builder.set_remote_url(remote)
        builder.sign(signer, mime, io.BytesIO(data), out)
    return out.getvalue()


# ---- stores ----


def box(kind, body):
    return struct.pack(">I", len(body) + 8) + kind + body


def described(kind, label):
    """A JUMBF description box, of C2PA's type `kind`."""
    return box(
        b"jumd", kind + bytes.fromhex("00110010800000aa00389b71") + b"\3" + label.encode() + b"\0"
    )


def superbox(kind, label, *inside):
    return box(b"jumb", described(kind, label) + b"".join(inside))


def with_store(png, store):
    """A PNG with these bytes as its C2PA store."""
    return png[:33] + chunk(b"caBX", store) + png[33:]


def store_of(png):
    at = png.index(b"caBX")
    return png[at + 4 : at + 4 + struct.unpack(">I", png[at - 4 : at])[0]]


def manifest(number, *inside):
    return superbox(b"c2ma", f"urn:c2pa:{number:08x}-0000-4000-8000-000000000000", *inside)


def store(*manifests):
    return superbox(b"c2pa", "c2pa", *manifests)


def nested(depth):
    """Boxes in boxes. Each announces all bytes behind it."""
    head = described(b"c2pa", "c2pa")
    each = 8 + len(head)
    return b"".join(struct.pack(">I", (depth - i) * each) + b"jumb" + head for i in range(depth))


def full(number, claim=b"\xa0"):
    """A manifest with an assertion, this claim and a signature."""
    assertion = superbox(b"cbor", "c2pa.actions", box(b"cbor", b"\xa0"))
    return manifest(
        number,
        superbox(b"c2as", "c2pa.assertions", assertion),
        superbox(b"c2cl", "c2pa.claim", box(b"cbor", claim)),
        superbox(b"c2cs", "c2pa.signature", box(b"cbor", b"\x80")),
    )
