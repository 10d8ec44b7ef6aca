"""What a server and a worker refuse to be told, and what an address may look like."""

import io
import logging
import sys
from typing import Any

import pytest

from torch_ps.common import codecs, log
from torch_ps.common.errors import ConfigError
from torch_ps.common.options.parsers import parse_shard
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.common.wire.address import Address, parse, parse_list


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"listen": "50051"}, r"listen: an address must be HOST:PORT, .*; got '50051'"),
        ({"listen": "127.0.0.1:70000"}, "listen: a port must be between 0 and 65535; got 70000"),
        ({"listen": "0.0.0.0:50051"}, "listen 0.0.0.0:50051 can be reached from other machines.*or --insecure if"),
        ({"listen": "[::]:50051"}, "can be reached from other machines"),
        ({"listen": "host:50051"}, "can be reached from other machines"),
        ({"metrics": "0.0.0.0:9000"}, "metrics 0.0.0.0:9000 can be reached"),
        ({"metrics": "0.0.0.0:9000", "token_file": "t"}, "that page has neither TLS nor token"),
        ({"tls_ca": "ca"}, "tls_ca ca needs tls_cert and tls_key"),
        ({"tls_cert": "c"}, "tls_cert and tls_key go together"),
        ({"workers": 9, "max_workers": 8}, "workers=9 would wait for more than max_workers=8"),
        ({"metrics": "on"}, "metrics: an address must be HOST:PORT"),
        ({"workers": 0}, "workers must be >= 1; got 0"),
        ({"mode": "bulk"}, "mode must be one of sync, async, ssp; got 'bulk'"),
        ({"slack": 2}, "slack=2 is for mode ssp; the mode is sync"),
        ({"backup_workers": 1, "mode": "async"}, "backup_workers=1 is for mode sync; the mode is async"),
        ({"backup_workers": 2, "workers": 2}, "backup_workers=2 leaves none of 2 workers to wait for"),
        ({"max_staleness": 0}, "max_staleness=0 is for modes async and ssp"),
        ({"staleness_lr": "inverse"}, "staleness_lr=inverse is for modes async and ssp"),
        ({"mode": "async", "clip_norm": 1.0, "max_staleness": 4}, "clip_norm=1 needs whole gradients"),
        ({"shards": 0}, "shards must be between 1 and 1024; got 0"),
        ({"shards": 3, "listen": "127.0.0.1:65534"}, "3 shards from port 65534 on would end above port 65535"),
        ({"shard": "2/2", "lead": "a:1"}, "shard: a shard must be I/N with I below N"),
        ({"shard": "one"}, "shard: a shard must be I/N, such as 0/2"),
        ({"shard": "0/2", "shards": 2}, "shards=2 starts them all here, shard=0/2 one of them; give one"),
        ({"shard": "1/2"}, "shard 1/2 needs lead, the address of shard 0"),
        ({"shard": "0/2", "lead": "a:1"}, "lead a:1 is for shards other than 0"),
        ({"lead": "a:1"}, "lead a:1 is for shards other than 0"),
        ({"lead": "a:0", "shard": "1/2"}, "lead: a port must be between 1 and 65535; got 0"),
        ({"lease": 0.0}, "lease must be > 0 seconds; got 0.0"),
        ({"bucket_size": 5.0}, "bucket_size must be > 0 and <= 4 MiB; got 5.0"),
        ({"bucket_size": 0.0}, "bucket_size must be > 0 and <= 4 MiB; got 0.0"),
        ({"apply_threads": 0}, "apply_threads must be >= 1; got 0"),
        ({"log_level": "loud"}, "log_level must be one of debug, info, warning, error; got 'loud'"),
    ],
)
def test_server_refuses(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ServerConfig(**change)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"listen": "127.0.0.1:0", "shards": 1024},
        {"listen": "localhost:1", "metrics": "off"},
        {"listen": "[::1]:50051"},
        {"listen": "0.0.0.0:50051", "metrics": "0.0.0.0:9000", "insecure": True},
        {"listen": "0.0.0.0:50051", "token_file": "t"},
        {"listen": "0.0.0.0:50051", "tls_cert": "c", "tls_key": "k"},
        {"shard": "0/2"},
        {"shard": "1/2", "lead": "host0:50051"},
    ],
)
def test_server_accepts(change: dict[str, Any]) -> None:
    ServerConfig(**change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"servers": "a:1,b"}, "servers: an address must be HOST:PORT.*; got 'b'"),
        ({"servers": "a:1,a:1"}, "a list of servers must name each shard once; a:1 stands twice"),
        ({"servers": "a:0"}, "servers: a port must be between 1 and 65535"),
        ({"name": "a b"}, "name must be letters, digits, .*; got 'a b'"),
        ({"name": "x" * 65}, "at most 64"),
        ({"rank": -1}, "rank must be >= 0; got -1"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N; got 'tpu'"),
        ({"samples": 0}, "samples must be >= 1; got 0"),
        ({"batch_size": -1}, "batch_size must be >= 0"),
        ({"batch_size": "big"}, "batch_size must be a whole number or auto; got 'big'"),
        ({"lr": float("inf")}, "lr must be >= 0; got inf"),
        ({"compress": "zip"}, f"compress: codec 'zip' does not exist; choose one of {', '.join(codecs.forms())}"),
        ({"compress_pull": "zip"}, "compress_pull: codec 'zip' does not exist"),
        ({"compress": "topk"}, "compress: a density must be > 0 and <= 1"),
        ({"compress": "fp16:2"}, "this codec takes no argument; got '2'"),
        ({"codecs": "no_such_module"}, "codecs: cannot import 'no_such_module'"),
        ({"accumulate": 0}, "accumulate must be >= 1"),
        ({"local_steps": 0}, "local_steps must be >= 1; got 0"),
        ({"outer_lr": 0.7}, "outer_lr=0.7 is for local steps and local_steps is 1; give local_steps of 2 or more"),
        ({"outer_momentum": 0.0}, "outer_momentum=0 is for local steps and local_steps is 1"),
        ({"local_steps": 2, "outer_lr": 0.0}, "outer_lr must be > 0; got 0.0"),
        ({"local_steps": 2, "outer_momentum": 1.0}, "outer_momentum must be >= 0 and < 1; got 1.0"),
        ({"local_steps": 2, "overlap": "on"}, "overlap=on sends gradients during backward, but with local_steps=2"),
        ({"local_steps": 2, "overlap": "forward"}, "overlap=forward sends gradients during backward, but with"),
        ({"task": "gpt", "overlap": "forward"}, "overlap=forward is for training loops of one's own; .*task=gpt"),
        ({"overlap": "yes"}, "overlap must be one of auto, on, off, forward"),
        ({"timeout": 0.0}, "timeout must be > 0 seconds"),
        ({"slow": 0.5}, "slow must be >= 1; got 0.5"),
        ({"evaluations": -1}, "evaluations must be >= 0"),
    ],
)
def test_worker_refuses(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        WorkerConfig(**change)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_worker_accepts_device(device: str) -> None:
    assert WorkerConfig(device=device).device == device


def test_shard_text_is_read() -> None:
    assert parse_shard("1/3") == (1, 3)
    assert parse_shard("") == (0, 1)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:50051", Address("127.0.0.1", 50051)),
        (" host-0.example:1 ", Address("host-0.example", 1)),
        ("[::1]:65535", Address("::1", 65535)),
        ("[fe80::1%eth0]:7", Address("fe80::1%eth0", 7)),
    ],
)
def test_address_is_read_and_written_back(text: str, address: Address) -> None:
    assert parse(text) == address
    assert str(address) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":1",
        "host",
        "host:",
        "host:-1",
        "host:x",
        "host:1:2",
        "::1:5",
        "[::g]:5",
        "ho st:1",
        "host:99999",
        "http://a:1",
    ],
)
def test_malformed_address_is_refused_by_its_text(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(text)
    assert repr(text) in str(refused.value)


def test_port_0_is_for_listening_only() -> None:
    assert parse("a:0", free_port=True).port == 0
    with pytest.raises(ConfigError, match="between 1 and 65535; got 0 in 'a:0'"):
        parse("a:0")


def test_list_keeps_its_order() -> None:
    addresses = parse_list("b:2, a:1")
    assert addresses == (Address("b", 2), Address("a", 1))
    with pytest.raises(ConfigError, match="a list of servers must be"):
        parse_list(" , ")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("my-own-name", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert Address(host, 1).loopback is loopback


@pytest.fixture
def logged() -> io.StringIO:
    stream = io.StringIO()
    log.setup("worker w1", "info", stream)
    return stream


@pytest.mark.parametrize("word", ["job", "a " * 5000])
def test_event_is_one_line_with_time_process_and_text(logged: io.StringIO, word: str) -> None:
    logging.getLogger("torch_ps.worker").info("joined %s", word)
    logging.getLogger("torch_ps").debug("not shown")
    assert logged.getvalue().endswith(f"Z worker w1: joined {word}\n")
    assert len(logged.getvalue().splitlines()) == 1


def test_control_characters_cannot_forge_an_event(logged: io.StringIO) -> None:
    logging.getLogger("torch_ps").warning("name %s", "a\nb\x1b[31m\x9b\u2028")
    assert logged.getvalue().endswith("worker w1: warning: name a\\nb\\x1b[31m\\x9b\\u2028\n")


def test_traceback_follows_its_event_behind_a_bar(logged: io.StringIO) -> None:
    try:
        raise ValueError("why\nso")
    except ValueError:
        logging.getLogger("torch_ps").exception("failed")
    first, *rest = logged.getvalue().splitlines()
    assert first.endswith("worker w1: error: failed")
    assert rest
    assert all(line.startswith("    | ") for line in rest)


def test_second_setup_replaces_the_first(logged: io.StringIO) -> None:
    log.setup("server 0/1", "error", logged)
    logging.getLogger("torch_ps").warning("not shown")
    logging.getLogger("torch_ps").error("shown")
    assert len(logged.getvalue().splitlines()) == 1
    assert sys.stderr not in [getattr(each, "stream", None) for each in logging.getLogger("torch_ps").handlers]
