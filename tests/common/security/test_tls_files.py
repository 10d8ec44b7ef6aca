"""Token files and certificates: what is refused when they are read, and what happens when they change."""

import logging
import os
from pathlib import Path

import pytest

import torch_ps
from tests.support.certificates import Authority, write
from torch_ps.common.errors import ConfigError
from torch_ps.common.rpc.credentials import Access
from torch_ps.common.security.tls import Tls
from torch_ps.common.security.token import TokenFile
from torch_ps.worker.runtime.access import access

TOKEN, OTHER = "a-secret-of-the-job-0123456789", "another-secret-of-the-job"


def token_file(folder: Path, content: str) -> TokenFile:
    path = folder / "token"
    write(path, content.encode())
    return TokenFile(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; make one with: openssl rand -hex 32 > token"),
        ("\n \n", "is empty"),
        ("0123456789abcde", "token 1 in .* has 15 characters; 16 to 1024 are needed"),
        ("x" * 1025, "has 1025 characters"),
        (f"{TOKEN}\nshort", "token 2 in .* has 5 characters"),
        ("two words of a token", "a character other than letters"),
        ("\n".join([TOKEN] * 9), "has 9 lines; at most 8"),
        ("t\u00f6ken-of-16-characters", "bytes that are not ASCII"),
    ],
)
def test_token_file_that_is_no_good_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        token_file(tmp_path, content)
    assert TOKEN not in str(caught.value)


def test_token_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot read token_file {tmp_path}/none: No such file"):
        TokenFile(str(tmp_path / "none"))


def test_tokens_of_all_lines_are_accepted_and_the_first_is_shown(tmp_path: Path) -> None:
    tokens = token_file(tmp_path, f"  {TOKEN} \n{OTHER}\n")
    assert tokens.metadata == (("authorization", f"Bearer {TOKEN}"),)
    assert tokens.accepts(f"Bearer {TOKEN}")
    assert tokens.accepts(f"Bearer {OTHER}")
    for wrong in ("", TOKEN, "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"bearer {TOKEN}", "Bearer \u00f6"):
        assert not tokens.accepts(wrong)


def test_token_is_in_no_repr(tmp_path: Path) -> None:
    tokens = token_file(tmp_path, TOKEN)
    assert TOKEN not in repr(tokens) + str(tokens) + repr(Access(token=tokens))


def test_changed_token_file_is_read_again_and_a_bad_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = token_file(tmp_path, TOKEN)
    with caplog.at_level(logging.WARNING, "torch_ps"):
        write(tmp_path / "token", OTHER.encode())
        assert tokens.accepts(f"Bearer {OTHER}")
        assert not tokens.accepts(f"Bearer {TOKEN}")
        write(tmp_path / "token", b"short")
        assert tokens.accepts(f"Bearer {OTHER}")
        (tmp_path / "token").unlink()
        assert tokens.accepts(f"Bearer {OTHER}")
        assert tokens.accepts(f"Bearer {OTHER}")
    assert [record.message.rpartition("; ")[2] for record in caplog.records] == [
        "the content read before stays in use"
    ] * 2


def test_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, other = authority.issue("one"), authority.issue("other")
    with pytest.raises(ConfigError, match=r"tls_key .*other.key.pem is not the key of the certificate .*one.cert.pem"):
        Tls(cert=one.cert, key=other.key)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "TLS needs files"),
        ({"cert": "c"}, "tls_cert c needs tls_key"),
        ({"key": "k"}, "tls_key k needs tls_cert"),
        ({"ca": "/none"}, "cannot read tls_ca /none"),
        ({"ca": os.devnull}, "tls_ca /dev/null holds no certificate in PEM form"),
        ({"cert": os.devnull, "key": os.devnull}, "tls_cert /dev/null is not in PEM form"),
    ],
)
def test_files_that_no_connection_could_use_are_refused(files: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tls(**files)


def test_certificate_that_has_expired_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "torch_ps"):
        Authority(tmp_path).issue("late", days=-1)
    assert "late.cert.pem: certificate has expired; peers will refuse it" in caplog.text


def test_key_is_in_no_repr(tmp_path: Path) -> None:
    tls = Authority(tmp_path).issue("server")
    assert "PRIVATE" not in repr(tls) + repr(tls.pem) + repr(Access(tls))


def test_arguments_come_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    tls = authority.issue("worker")
    for name, value in (("CA", authority.ca), ("CERT", tls.cert), ("KEY", tls.key)):
        monkeypatch.setenv(f"PS_TLS_{name}", value)
    assert access(None, None, None).tls == tls
    assert access(authority.ca, None, None).tls == Tls(authority.ca)
    assert access(torch_ps.Tls(cert=tls.cert, key=tls.key), None, None).tls == Tls("", tls.cert, tls.key)
