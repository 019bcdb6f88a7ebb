"""PEM files of certificates and keys: whether they are valid, and when they expire.

Knows nothing about settings, servers or channels.
"""

import ssl
from datetime import UTC, datetime
from pathlib import Path

_VERSION, _UTC_TIME = 0xA0, 0x17  # ASN.1 tags


class TlsError(ValueError):
    """An unusable TLS file, which the message names."""


def read_file(path: Path) -> bytes:
    """The file's content; raises TlsError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"{path}: cannot be read: {error.strerror}") from None


def check_certificates(path: Path) -> None:
    """Raises TlsError unless the file holds certificates."""
    _load_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), path)


def server_context(certificate: Path, key: Path, client_ca: Path | None = None) -> ssl.SSLContext:
    """A server's context for TLS 1.2 and 1.3; with `client_ca`, it requires client certificates.

    Raises TlsError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    check_certificates(certificate)
    read_file(key)
    try:
        # Without a password function, OpenSSL would prompt for one at the terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except OSError as error:  # SSLError is one
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise TlsError(f"{key}: does not match the certificate {certificate}") from None
        raise TlsError(f"{key}: not a PEM private key without a passphrase") from None
    if client_ca is not None:
        _load_certificates(context, client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def expiry(certificates: bytes) -> datetime:
    """When the first of these PEM certificates expires.

    That is the second time in `validity`, the fifth field of a certificate with a version field
    (RFC 5280, section 4.1).
    """
    text = certificates.decode("latin-1")
    begin, end = text.index(ssl.PEM_HEADER), text.index(ssl.PEM_FOOTER) + len(ssl.PEM_FOOTER)
    [(_, certificate)] = _parts(ssl.PEM_cert_to_DER_cert(text[begin:end]))
    signed = [part for part in _parts(_parts(certificate)[0][1]) if part[0] != _VERSION]
    kind, value = _parts(signed[3][1])[1]
    digits = value.decode("ascii").rstrip("Z")
    if kind == _UTC_TIME:  # two-digit year
        digits = ("19" if digits >= "50" else "20") + digits
    return datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=UTC)


def _load_certificates(context: ssl.SSLContext, path: Path) -> None:
    is_plain = ssl.PEM_HEADER.encode() in read_file(path)  # not OpenSSL's TRUSTED CERTIFICATE
    try:
        context.load_verify_locations(path)
    except OSError:  # SSLError is one
        is_plain = False
    if not is_plain:
        raise TlsError(f"{path}: contains no PEM certificate")


def _parts(der: bytes) -> list[tuple[int, bytes]]:
    """Tags and contents of the consecutive values in `der`."""
    parts = []
    while der:
        length, head = der[1], 2
        if length >= 0x80:
            head = 2 + length - 0x80
            length = int.from_bytes(der[2:head])
        parts.append((der[0], der[head : head + length]))
        der = der[head + length :]
    return parts
