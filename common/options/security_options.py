"""Options of TLS and of the token, declared once for all commands, and the addresses that they allow a server.

    tls_ca, tls_cert, tls_key, token_file      the same for servers and workers, as flags, variables and TOML keys

Rules of this file
  1. Only names of files and addresses are checked; ``torch_ps.common.security.tls`` and ``token`` read the files.

Source: RFC 8446 (TLS 1.3) and RFC 6750 (bearer tokens).
"""

from typing import Any

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.fields import option
from torch_ps.common.wire import address


def tls_ca() -> Any:
    return _file("TLS: authorities that must have issued the peer's certificate; a server then requires one of clients")


def tls_cert() -> Any:
    return _file("TLS: certificate of this process, followed by its chain")


def tls_key() -> Any:
    return _file("TLS: private key of that certificate")


def token_file() -> Any:
    return _file("file with the job's token, at least 16 characters, which workers have to show")


def insecure() -> Any:
    """The option of clients; that of servers is about the address that they listen on."""
    return option(False, "allow sending the token in the clear to other machines", per_process=True)


def _file(help: str) -> Any:
    return option("", help, metavar="FILE")


def check_server(
    *, listen: str, metrics: str, insecure: bool, tls_ca: str, tls_cert: str, tls_key: str, token_file: str
) -> None:
    """Refuse an address that other machines can reach, unless TLS or a token protects it or the user allows it.

    Raises:
        ConfigError: an address is not protected, or a file is missing; names it and the remedy.
    """
    if tls_ca and not tls_cert:
        raise ConfigError(f"tls_ca {tls_ca} needs tls_cert and tls_key: a server with TLS has a certificate of its own")
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
