"""C2PA files as tests use them: a certificate chain of our own, pictures signed with it, stores taken apart and put together wrongly."""

import datetime
import functools
import io
import struct

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID
from test_decoding import chunk

TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype/"
QUIET = {"verify": {"verify_after_sign": False}, "builder": {"thumbnail": {"enabled": False}}}


# ---- signing ----


def certificate(name, key, issuer, issuer_key, authority, seconds, ocsp=None):
    """An x509 certificate as C2PA wants it: of a signer, for the use `emailProtection`, or of an authority."""
    now = datetime.datetime.now(datetime.timezone.utc)
    use = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    use |= {"digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority}
    subject, by = (
        x509.Name(
            [
                x509.NameAttribute(kind, n)
                for kind in (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME)
            ]
        )
        for n in (name, issuer)
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by)
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
        place = x509.AccessDescription(
            AuthorityInformationAccessOID.OCSP, x509.UniformResourceIdentifier(ocsp)
        )
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
    """Bytes of an image of this format, signed: made by what `term` says, or an edit of `parent`, with `others` in it; `remote`: the
    manifest is left out, and this address of it written instead; `ocsp`: where to ask whether the certificate is still good.
    """
    pem, key = chain(name, seconds, ocsp)
    created = [{"action": "c2pa.created", "digitalSourceType": TERMS + term}]
    manifest = {
        "claim_generator_info": [{"name": "Test Generator", "version": "2.0"}],
        "assertions": [
            *(
                []
                if parent
                else [{"label": "c2pa.actions", "data": {"actions": actions or created}}]
            ),
            *assertions,
        ],
    }
    out, mime = io.BytesIO(), f"image/{kind.lower()}"
    context = c2pa.Context.from_dict(QUIET)
    with (
        c2pa.Signer.from_info(c2pa.C2paSignerInfo("es256", pem, key, None)) as signer,
        c2pa.Builder(manifest, context=context) as builder,
    ):
        if parent:
            builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
            builder.add_ingredient(
                {"title": "a", "relationship": "parentOf"}, mime, io.BytesIO(parent)
            )
        for other in others:
            builder.add_ingredient(
                {"title": "b", "relationship": "componentOf"}, mime, io.BytesIO(other)
            )
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
    """A PNG with this C2PA store, whatever it is."""
    return png[:33] + chunk(b"caBX", store) + png[33:]


def store_of(png):
    at = png.index(b"caBX")
    return png[at + 4 : at + 4 + struct.unpack(">I", png[at - 4 : at])[0]]


def manifest(number, *inside):
    return superbox(b"c2ma", f"urn:c2pa:{number:08x}-0000-4000-8000-000000000000", *inside)


def store(*manifests):
    return superbox(b"c2pa", "c2pa", *manifests)


def nested(depth):
    """Boxes in boxes, each announcing all that is left."""
    head = described(b"c2pa", "c2pa")
    each = 8 + len(head)
    return b"".join(struct.pack(">I", (depth - i) * each) + b"jumb" + head for i in range(depth))


def claimed(cbor):
    """A store of one manifest with this claim."""
    return store(
        manifest(
            0,
            superbox(
                b"c2as", "c2pa.assertions", superbox(b"cbor", "c2pa.actions", box(b"cbor", b"\xa0"))
            ),
            superbox(b"c2cl", "c2pa.claim", box(b"cbor", cbor)),
            superbox(b"c2cs", "c2pa.signature", box(b"cbor", b"\x80")),
        )
    )
