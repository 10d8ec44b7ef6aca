"""The options of TLS and of the token, declared once for all commands, and what a server may listen on with them.

    tls_ca, tls_cert, tls_key, token_file      the same four at servers and workers, as flags, variables and TOML keys

Rules of this file
  1. Names of files and addresses are weighed, no file is read: ``torch_ps.common.security.tls`` and ``token`` do that.

Source: RFC 8446 and RFC 6750 for what the two protect.
"""

from typing import Any

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.fields import option
from torch_ps.common.wire import address


def tls_ca() -> Any:
    return _file("TLS: authorities that the peer's certificate has to be of; at a server, clients then need one")


def tls_cert() -> Any:
    return _file("TLS: certificate of this process, with its chain behind it")


def tls_key() -> Any:
    return _file("TLS: its private key")


def token_file() -> Any:
    return _file("file with the job's secret, at least 16 characters, which servers ask workers for")


def insecure() -> Any:
    """At a client; a server's is about the address that it listens on."""
    return option(False, "allow the token to travel in the clear to other machines", per_process=True)


def _file(help: str) -> Any:
    return option("", help, metavar="FILE")


def check_server(
    *, listen: str, metrics: str, insecure: bool, tls_ca: str, tls_cert: str, tls_key: str, token_file: str
) -> None:
    """Refuse an address that strangers can reach, unless something keeps them out or the user says so.

    Raises:
        ConfigError: names the address and what would do.
    """
    if tls_ca and not tls_cert:
        raise ConfigError(f"tls_ca {tls_ca} needs tls_cert and tls_key: a server that speaks TLS shows its own")
    if bool(tls_cert) != bool(tls_key):
        raise ConfigError("tls_cert and tls_key go together: a certificate and its private key")
    if insecure:
        return
    if not (_loopback(listen) or tls_cert or token_file):
        raise ConfigError(
            f"listen {listen} can be reached from other machines and nothing protects it: whoever connects can "
            "read and change the model; use 127.0.0.1, TLS (tls_cert), a token (token_file), or --insecure if every "
            "machine there is trusted"
        )
    if metrics != "off" and not _loopback(metrics):
        raise ConfigError(
            f"metrics {metrics} can be reached from other machines, and that page has neither TLS nor token: "
            "whoever connects can read the names of workers and how training goes; use 127.0.0.1, or --insecure if "
            "every machine there is trusted"
        )


def _loopback(text: str) -> bool:
    return address.parse(text, free_port=True).loopback
