"""A worker's servers, name, TLS files and token: from arguments, or from the environment that ps-worker makes.

    tls="ca.pem"                         verify the servers
    tls=Tls(ca=..., cert=..., key=...)   and show them a certificate
    token_file="token"                   and a token

An argument that is None is taken from the environment; ``tls`` is taken as a whole.
"""

import os
import socket
import uuid
from dataclasses import dataclass

from torch_ps.common.errors import ConfigError
from torch_ps.common.options import security_options as protection
from torch_ps.common.options.every_option import check_variables
from torch_ps.common.options.fields import declared, from_environment
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.common.rpc.credentials import Access, access_of
from torch_ps.common.security.tls import Tls
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.job_servers import JobServers, parse_jobs

#: Whether anything in this process has asked for servers, which an optimizer and a client do.
servers_named = False


def jobs_of(servers: str | None) -> tuple[JobServers, ...]:
    """The servers of each job, from ``servers`` or, if that is None, from ``$PS_SERVERS``.

    Raises:
        ConfigError: neither is given, an address is malformed, or a variable looks like an option and is none.
    """
    global servers_named
    servers_named = True
    check_variables(os.environ)
    text = servers if servers is not None else os.environ.get("PS_SERVERS", "")
    if not text:
        raise ConfigError('no servers: pass servers="host:port" or set PS_SERVERS (ps-worker and ps-run set it)')
    return parse_jobs(text)


def addresses_of(servers: str | None, job: str | None = None) -> tuple[tuple[Address, ...], ...]:
    """For each shard of one job, the addresses of its servers.

    Args:
        servers: the servers of one job or of several; ``$PS_SERVERS`` if None.
        job: name of the job; ``$PS_JOB`` if None. Without a name there has to be one job.

    Raises:
        ConfigError: no servers are given, or an address is malformed, or it is not clear which job is meant.
    """
    jobs, wanted = jobs_of(servers), os.environ.get("PS_JOB", "") if job is None else job
    found = [each for each in jobs if not wanted or each.name == wanted]
    if len(found) != 1:
        names = ", ".join(each.name for each in jobs)
        raise ConfigError(
            f"the servers are those of {len(jobs)} jobs ({names or 'one without a name'}); "
            + (f"{wanted!r} is none of them" if wanted else "name one of them by job")
        )
    return found[0].shards


def default_name(rank: int | None = None) -> str:
    """The name of a worker that was given none.

    It is ``$PS_NAME``, else made of the rank, which a restarted worker has again, else one that no other worker has.
    """
    made_up = f"{socket.gethostname()[:40]}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    return os.environ.get("PS_NAME") or (made_up if rank is None else f"w{rank}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """The options of ``WorkerConfig`` about TLS and the token."""

    tls_ca: str = protection.tls_ca()
    tls_cert: str = protection.tls_cert()
    tls_key: str = protection.tls_key()
    token_file: str = protection.token_file()
    insecure: bool = protection.insecure()


def tls_fields(tls: Tls | str | None) -> dict[str, str]:
    """The options that an argument ``tls`` stands for; none for None."""
    if tls is None:
        return {}
    tls = Tls(ca=tls) if isinstance(tls, str) else tls
    return {"tls_ca": tls.ca, "tls_cert": tls.cert, "tls_key": tls.key}


def access_fields(tls: Tls | str | None, token_file: str | None) -> dict[str, str | None]:
    """The options that both arguments stand for; None where an argument is None."""
    return {**tls_fields(tls), "token_file": token_file}


def access(tls: Tls | str | None, token_file: str | None, insecure: bool | None) -> Access:
    """TLS and token settings from the arguments of a client, and from the environment where these are None.

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
    """The TLS files in the options of a worker; None if it uses no TLS.

    Raises:
        ConfigError: a file cannot be read or used.
    """
    given = config.tls_ca, config.tls_cert, config.tls_key
    return Tls(*given) if any(given) else None


def access_in(config: WorkerConfig) -> Access:
    """TLS and token settings from the options of a worker.

    Raises:
        ConfigError: a file cannot be read or used.
    """
    return access_of(config.tls_ca, config.tls_cert, config.tls_key, config.token_file, insecure=config.insecure)
