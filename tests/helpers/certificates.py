"""Certificates as C2PA signers have them, made for the occasion."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_USES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
    "encipher_only", "decipher_only",
)  # fmt: skip


def make(folder: Path, name: str = "signer", curve: ec.EllipticCurve | None = None) -> tuple[Path, Path]:
    """A chain of two certificates and the key of the first, as PEM files."""
    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(curve or ec.SECP256R1())
    authority = _build("Root", "Root", root, ("key_cert_sign", "crl_sign"), True).sign(root, hashes.SHA256())
    built = _build("A. Signer", "Root", own, ("digital_signature",), False)
    built = built.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
    built = built.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), False)
    chain = [built.sign(root, hashes.SHA256()), authority]
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    pem = serialization.Encoding.PEM
    certificate.write_bytes(b"".join(each.public_bytes(pem) for each in chain))
    key.write_bytes(own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return certificate, key


def _build(subject, issuer, key, uses, authority):
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)

    def named(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests")])

    builder = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named(issuer)).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + 30 * day)
    builder = builder.add_extension(x509.BasicConstraints(authority, None), True)
    builder = builder.add_extension(x509.KeyUsage(**{use: use in uses for use in _USES}), True)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
