"""How a worker's program says who it is and whom it believes: arguments, or the environment that ps-worker makes.

    tls="ca.pem"                         verify the servers
    tls=Tls(ca=..., cert=..., key=...)   and show them a certificate
    token_file="token"                   and a token

Rules of this file
  1. An argument that is None is taken from the environment, as everywhere; ``tls`` is taken as a whole.
"""

import os
from dataclasses import dataclass

from torch_ps.common.options import security_options as protection
from torch_ps.common.options.config import WorkerConfig
from torch_ps.common.options.fields import declared, from_environment
from torch_ps.common.rpc.credentials import Access, access_of
from torch_ps.common.security.tls import Tls


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """The part of ``WorkerConfig`` that is about access."""

    tls_ca: str = protection.tls_ca()
    tls_cert: str = protection.tls_cert()
    tls_key: str = protection.tls_key()
    token_file: str = protection.token_file()
    insecure: bool = protection.insecure()


def tls_fields(tls: Tls | str | None) -> dict[str, str]:
    """The options that ``tls`` stands for; {} for None."""
    if tls is None:
        return {}
    tls = Tls(ca=tls) if isinstance(tls, str) else tls
    return {"tls_ca": tls.ca, "tls_cert": tls.cert, "tls_key": tls.key}


def access_fields(tls: Tls | str | None, token_file: str | None) -> dict[str, str | None]:
    """The options that both stand for; None where nothing is said."""
    return {**tls_fields(tls), "token_file": token_file}


def access(tls: Tls | str | None, token_file: str | None, insecure: bool | None) -> Access:
    """What the arguments of a client say, and the environment where they say nothing.

    Raises:
        ConfigError: a file cannot be read or used.
    """
    found = from_environment(_Files, os.environ)
    values = {name: getattr(found, name) for name in declared(_Files)} | tls_fields(tls)
    if token_file is not None:
        values["token_file"] = token_file
    if insecure is not None:
        values["insecure"] = insecure
    return access_of(**values)


def tls_in(config: WorkerConfig) -> Tls | None:
    """The TLS files in the options of a worker; None: it speaks in the clear.

    Raises:
        ConfigError: a file cannot be read or used.
    """
    given = config.tls_ca, config.tls_cert, config.tls_key
    return Tls(*given) if any(given) else None


def access_in(config: WorkerConfig) -> Access:
    """What the options of a worker say.

    Raises:
        ConfigError: a file cannot be read or used.
    """
    return access_of(config.tls_ca, config.tls_cert, config.tls_key, config.token_file, insecure=config.insecure)
