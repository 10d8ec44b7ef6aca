"""Client of etcd's JSON gateway for what a seat needs: a lease, two keys, and transactions on them.

    URL[,URL...]    http(s)://[USER:PASSWORD@]HOST:PORT[/NAME]    one cluster; NAME keeps jobs apart

Rules of this file
  1. It uses HTTP and JSON of the standard library, so that no client library has to be kept up to date. Every call has
     a deadline and tries the addresses in turn.
  2. A lease counts from the moment before the call that renewed it was sent, on a clock that goes on while the machine
     sleeps.

Source: https://etcd.io/docs/v3.5/dev-guide/api_grpc_gateway/
"""

import base64
import http.client
import json
import ssl
import urllib.error
import urllib.request
from typing import Any, NamedTuple

from torch_ps.common.errors import PsError, Unreachable
from torch_ps.common.options.parsers import Etcd as Endpoint
from torch_ps.common.security.tls import Tls, load
from torch_ps.common.wire.terms import Configuration, Term
from torch_ps.ps.core.failover.seat import Transact
from torch_ps.ps.job.conditions import clock

#: Seconds that a call may take at each address.
SECONDS = 3.0


class Refusal(PsError):
    """etcd has answered with an HTTP error below 500, its ``status``."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Seen(NamedTuple):
    """The two keys of a seat at one moment: see ``LeasedSeat.observed``."""

    revision: int
    configuration: Configuration | None
    holder: str


class EtcdClient:
    """The seat of one shard. Calls block; none takes longer than ``SECONDS`` at each address.

    Args:
        endpoint: Addresses, credentials and the name of the job.
        shard: Index of the shard.
        ttl: Seconds that a lease lasts, >= 2.
        tls: Certificates for https; None trusts the system's authorities and shows no certificate.

    Attributes:
        until: Time on ``clock`` until which the lease holds at least.
    """

    def __init__(self, endpoint: Endpoint, shard: int, ttl: int, tls: Tls | None = None) -> None:
        self._endpoint, self._ttl, self._tls = endpoint, ttl, tls
        self._configuration = f"/{endpoint.name}/{shard}/configuration"
        self._holder = f"/{endpoint.name}/{shard}/holder"
        self._lease = ""  # a number, as JSON has it
        self._token = ""
        self.until = 0.0

    def renew(self) -> None:
        """Renew the lease, or get a new one if it has run out.

        Raises:
            PsError: etcd does not answer, or refuses.
        """
        sent = clock()
        if self._lease:
            reply = self._call("lease/keepalive", {"ID": self._lease}).get("result", {})
            if int(reply.get("TTL", 0)) > 0:
                self.until = sent + min(self._ttl, int(reply["TTL"]))
                return
        reply = self._call("lease/grant", {"TTL": str(self._ttl)})
        self._lease, self.until = reply["ID"], sent + min(self._ttl, int(reply["TTL"]))

    def look(self) -> Seen:
        """Read both keys at one moment.

        Raises:
            PsError: etcd does not answer or refuses, or the key does not hold a configuration.
        """
        both = [{"request_range": {"key": _text(key)}} for key in (self._configuration, self._holder)]
        found = [
            each.get("response_range", {}).get("kvs", [{}])[0]
            for each in self._call("kv/txn", {"success": both})["responses"]
        ]
        configuration = _read(found[0]["value"], self._configuration) if found[0] else None
        revision = int(found[0].get("mod_revision", 0))
        return Seen(revision, configuration, base64.b64decode(found[1].get("value", "")).decode())

    def transact(self, wanted: Transact, me: str) -> int:
        """Write the configuration and this server as its holder, if both keys are as ``wanted`` expects.

        Args:
            me: Name of this life of this server, which then holds the seat.

        Returns:
            The revision of the write; 0 if a key had changed.

        Raises:
            PsError: etcd does not answer or refuses; the write may have happened or not.
        """
        holder = {"key": _text(self._holder)}
        as_it_was: dict[str, Any] = (
            {**holder, "target": "VALUE", "value": _text(wanted.holder)}
            if wanted.holder
            else {**holder, "target": "VERSION", "version": "0"}
        )
        key = {"key": _text(self._configuration)}
        reply = self._call(
            "kv/txn",
            {
                "compare": [{**key, "target": "MOD", "mod_revision": str(wanted.revision)}, as_it_was],
                "success": [
                    {"request_put": {**key, "value": _text(_written(wanted.configuration))}},
                    {"request_put": {**holder, "value": _text(me), "lease": self._lease}},
                ],
            },
        )
        return int(reply["header"]["revision"]) if reply.get("succeeded") else 0

    def give_up(self) -> None:
        """End the lease, and with it this server's hold of the seat.

        Raises:
            PsError: etcd does not answer, or refuses.
        """
        if self._lease:
            self._call("lease/revoke", {"ID": self._lease})
            self._lease, self.until = "", 0.0

    # -------------------------------------------------------------- HTTP

    def _call(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        if self._endpoint.user and not self._token:
            self._sign_in()
        try:
            return self._post(method, body)
        except Refusal as refusal:
            if not self._endpoint.user or refusal.status != http.client.UNAUTHORIZED:
                raise
        self._sign_in()  # the token has expired
        return self._post(method, body)

    def _sign_in(self) -> None:
        who = {"name": self._endpoint.user, "password": self._endpoint.password}
        self._token = ""
        self._token = self._post("auth/authenticate", who)["token"]

    def _context(self) -> ssl.SSLContext:
        """TLS settings from the certificate files as they are now."""
        context = ssl.create_default_context(cafile=(self._tls and self._tls.ca) or None)
        if self._tls is not None and self._tls.cert:
            load(context, self._tls.cert, self._tls.key)
        return context

    def _post(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": self._token} if self._token else {})
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self._context())
        )
        why = ""
        for url in self._endpoint.urls:
            request = urllib.request.Request(f"{url}/v3/{method}", data, headers)
            try:
                with opener.open(request, timeout=SECONDS) as reply:
                    found: dict[str, Any] = json.load(reply)
                    return found
            except urllib.error.HTTPError as error:
                if error.code < http.client.INTERNAL_SERVER_ERROR:
                    raise Refusal(f"etcd at {url} refuses {method}: {_said(error)}", error.code) from None
                why = f"{why}; {url}: {_said(error)}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                why = f"{why}; {url}: {error}"
        raise Unreachable(f"etcd does not answer{why}")


def _said(error: urllib.error.HTTPError) -> str:
    with error:
        body = error.read(1000).decode(errors="replace").strip()
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body or str(error)


def _text(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _written(configuration: Configuration) -> str:
    term = configuration.term
    return json.dumps({"term": term.number, "primary": term.server, "standby": configuration.standby})


def _read(value: str, key: str) -> Configuration:
    try:
        found = json.loads(base64.b64decode(value))
        number, primary, standby = found["term"], found["primary"], found["standby"]
        if not (type(number) is int and number > 0 and isinstance(primary, str) and isinstance(standby, str)):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise PsError(f"etcd's key {key} holds something else than a configuration; choose another name") from None
    return Configuration(Term(number, primary), standby)
