"""Certificates of a deployment: who trusts them, for which hosts, and who can read the keys."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedsim.checks import ConfigError
from fedsim.flower.certificates import ServerFiles, issue_node_key, issue_server

HOSTS = ["server.example.org", "10.1.2.3", "fd00::7"]


@pytest.fixture
def files(tmp_path: Path) -> ServerFiles:
    return issue_server(tmp_path, HOSTS)


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def verify(files: ServerFiles, host: str, authority: Path | None = None) -> list[x509.Certificate]:
    """The chain of RFC 5280 that makes the superlink ``host``; by another implementation than the one that signs."""
    subject: x509.GeneralName
    try:
        subject = x509.IPAddress(ip_address(host))
    except ValueError:
        subject = x509.DNSName(host)
    builder = PolicyBuilder().store(Store([load(authority or files.authority)]))
    return builder.build_server_verifier(subject).verify(load(files.certificate), [])


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", *HOSTS])
def test_chain_holds_for_loopback_and_every_given_host(files: ServerFiles, host: str) -> None:
    assert verify(files, host) == [load(files.certificate), load(files.authority)]


@pytest.mark.parametrize("host", ["example.org", "other.example.org", "10.1.2.4", "::1"])
def test_no_other_host_is_believed(files: ServerFiles, host: str) -> None:
    with pytest.raises(VerificationError):
        verify(files, host)


def test_another_authority_is_not_believed(files: ServerFiles, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = issue_server(tmp_path / "other", HOSTS)
    with pytest.raises(VerificationError):
        verify(files, "localhost", other.authority)


def handshake(files: ServerFiles, trust: Path, host: str) -> str | None:
    """The TLS version that OpenSSL agrees on with a server that has these files."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.certificate, files.key)
    client = ssl.create_default_context(cafile=str(trust))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default of later Pythons
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=host) as line:
            return line.version()
    finally:
        ours.close()
        thread.join()


def test_openssl_agrees_with_key_and_certificate(files: ServerFiles, tmp_path: Path) -> None:
    assert handshake(files, files.authority, "127.0.0.1") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        handshake(files, files.authority, "elsewhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(files, issue_server(tmp_path / "other", []).authority, "127.0.0.1")


def test_private_keys_are_their_owners_alone(files: ServerFiles, tmp_path: Path) -> None:
    node = issue_node_key(tmp_path, "node-0")
    for path in (files.key, node.private):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_key_that_signs_is_written_nowhere(files: ServerFiles, tmp_path: Path) -> None:
    signer = load(files.authority).public_key()
    issue_node_key(tmp_path, "node-0")
    keys = [path for path in tmp_path.iterdir() if b"PRIVATE KEY" in path.read_bytes()]
    assert sorted(path.name for path in keys) == ["node-0.key", "superlink.key"]
    server = load_pem_private_key(files.key.read_bytes(), None)
    assert server.public_key() == load(files.certificate).public_key() != signer


def test_only_the_authority_may_sign(files: ServerFiles) -> None:
    def may_sign(path: Path) -> bool:
        extensions = load(path).extensions
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        assert usage.key_cert_sign == extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        return usage.key_cert_sign

    assert (may_sign(files.authority), may_sign(files.certificate)) == (True, False)


def test_certificates_hold_for_a_year_from_yesterday(files: ServerFiles) -> None:
    now = datetime.now(UTC)
    for path in (files.authority, files.certificate):
        begins, ends = load(path).not_valid_before_utc, load(path).not_valid_after_utc
        assert abs(begins - (now - timedelta(days=1))) < timedelta(minutes=1)
        assert abs(ends - (now + timedelta(days=365))) < timedelta(minutes=1)


def test_node_keys_are_pairs_as_flower_reads_them(tmp_path: Path) -> None:
    first, second = (issue_node_key(tmp_path, f"node-{node}") for node in range(2))
    private = load_ssh_private_key(first.private.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert load_ssh_public_key(first.public.read_bytes()) == private.public_key()
    assert load_ssh_public_key(second.public.read_bytes()) != private.public_key()


@pytest.mark.parametrize("host", ["", "a b", "-x", "x_y", "256.1.1.1", "1.2.3", "a" * 64, "http://x"])
def test_what_is_no_host_is_refused_before_anything_is_written(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a host name or an IP address"):
        issue_server(tmp_path, [host])
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    before = issue_node_key(tmp_path, "node-0").private.read_bytes()
    with pytest.raises(FileExistsError):
        issue_node_key(tmp_path, "node-0")
    assert (tmp_path / "node-0.key").read_bytes() == before
