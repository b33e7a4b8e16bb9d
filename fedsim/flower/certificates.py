"""TLS for a deployment: an authority of its own, the superlink's certificate, and a key pair for every supernode.

The authority's private key is never written: what it has signed can be checked, and nobody can sign anything more.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.checks import ConfigError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

VALID_DAYS = 365
"""How long certificates are good for; they begin a day early, for clocks that are behind."""

LOOPBACK = ("localhost", "127.0.0.1")
"""Hosts that every certificate is good for."""


@dataclass(frozen=True)
class ServerFiles:
    """PEM files of a superlink: the authority's certificate, its own, and its private key (mode 0600)."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class NodeKey:
    """A supernode's key pair in OpenSSH's format: the private file (mode 0600) and the public one."""

    private: Path
    public: Path


def issue_server(folder: Path, hosts: Sequence[str]) -> ServerFiles:
    """Write ``authority.pem``, ``superlink.pem`` and ``superlink.key`` into ``folder``, which must exist.

    Args:
        folder: where to.
        hosts: names or addresses under which the superlink is reached, beside localhost and 127.0.0.1.

    Raises:
        ConfigError: if one of ``hosts`` is neither a host name nor an IP address.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    names = [_general_name(host) for host in dict.fromkeys((*LOOPBACK, *hosts))]
    authority_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fedsim deployment authority")])
    authority = _certificate(authority_name, authority_key, authority_name, authority_key, _usage(signs=True))
    server_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fedsim superlink")])
    server_extensions = [
        *_usage(signs=False),
        (x509.SubjectAlternativeName(names), False),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
    ]
    server = _certificate(server_name, server_key, authority_name, authority_key, server_extensions)
    files = ServerFiles(folder / "authority.pem", folder / "superlink.pem", folder / "superlink.key")
    _write(files.authority, _pem(authority))
    _write(files.certificate, _pem(server))
    _write_secret(files.key, _private_pem(server_key))
    return files


def issue_node_key(folder: Path, name: str) -> NodeKey:
    """Write ``NAME.key`` and ``NAME.pub`` into ``folder``: a P-384 pair, as Flower's supernodes prove who they are."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    files = NodeKey(folder / f"{name}.key", folder / f"{name}.pub")
    _write_secret(
        files.private,
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        ),
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(files.public, public + f" {name}\n".encode())
    return files


def check_host(key: str, host: str) -> str:
    """Return ``host`` if it can be a host's name or address.

    Raises:
        ConfigError: naming ``key``.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        labels = host.split(".")
        named = all(re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)", label) for label in labels)
        # Of digits and dots alone only an address is made, and this one is none.
        if not named or len(host) > 253 or re.fullmatch(r"[0-9.]+", host):
            raise ConfigError(f"{key}={host}: must be a host name or an IP address") from None
    return host


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    check_host("host", host)
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(signs: bool) -> list[tuple[x509.ExtensionType, bool]]:
    from cryptography import x509

    usage = x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return [(x509.BasicConstraints(ca=signs, path_length=0 if signs else None), True), (usage, True)]


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(issuer_key, hashes.SHA384())


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _write_secret(path: Path, content: bytes) -> None:
    """Write a new file that nobody else can read, at no moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
