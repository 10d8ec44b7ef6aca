"""Real certificates for tests: authorities that live for a minute, and what they issue, as PEM files."""

import datetime
import ipaddress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from torch_ps.common.security.tls import Tls

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
NAMES = ("localhost", "127.0.0.1")


class Authority:
    """A certificate authority; ``issue`` writes files into ``folder``."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder, self._name = folder, _named(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(self._name, self._name, self._key, NOW - DAY, NOW + DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    @property
    def ca(self) -> str:
        return str(self.path)

    def issue(self, name: str, *, days: float = 1, names: tuple[str, ...] = NAMES, mutual: bool = True) -> Tls:
        """A certificate of this authority for ``names``; with ``days`` below 0 it has expired.

        Args:
            mutual: True if the files also name this authority as the trusted one.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(_named(name), self._name, key, NOW - 2 * DAY, NOW + days * DAY)
            .add_extension(x509.SubjectAlternativeName([_alternative(each) for each in names]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        cert, key_file = self._folder / f"{name}.cert.pem", self._folder / f"{name}.key.pem"
        write(cert, certificate.public_bytes(serialization.Encoding.PEM))
        write(
            key_file,
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )
        return Tls(ca=self.ca if mutual else "", cert=str(cert), key=str(key_file))


def write(path: Path, content: bytes) -> None:
    """As a renewal does: the file is whole at any moment, and another one than before."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)


def options(tls: Tls) -> dict[str, Any]:
    """The options of a command for these files."""
    return {"tls_ca": tls.ca, "tls_cert": tls.cert, "tls_key": tls.key}


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    begin: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
