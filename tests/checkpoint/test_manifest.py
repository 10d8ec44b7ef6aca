"""The reader of manifests takes any bytes: it gives a document that was checked, or an error with the file's name."""

import contextlib
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_ps.common.errors import CheckpointError
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.ps.checkpoint import manifest as manifests
from torch_ps.ps.checkpoint.manifest import Manifest, ShardManifest
from torch_ps.ps.checkpoint.storage import FileFact
from torch_ps.ps.core.ledger import Ledger

DIGEST = hashlib.sha256(b"").hexdigest()
RECORD = {**Ledger(0).as_dict(), "version": 12, "ledger": {"w0": [3, 11, 0, True]}}
SHARD = ShardManifest(
    version=12,
    shard=0,
    num_shards=1,
    tensors=FileFact(manifests.shard_name(12, 0, 1, "safetensors"), 100, DIGEST),
    records=(RECORD,),
    counters={"late": 0, "nonfinite": 1, "staleness": [[0, 12]]},
)
WHOLE = Manifest(
    version=12,
    mode="sync",
    bucket_bytes=4096,
    model=Model(
        "AdamW",
        (Group((TensorSpec("weight", (3, 4), "float16"),), {"lr": 0.1, "betas": (0.9, 0.99), "amsgrad": False}),),
        (TensorSpec("count", (), "int64"),),
    ),
    shards=(FileFact(manifests.shard_name(12, 0, 1, "json"), 100, DIGEST),),
    sections={"roster": {"epoch": 3, "members": [["w0", 3, None, 0]]}},
    created=1.5,
)


def whole(data: bytes) -> Manifest:
    return manifests.parse(manifests.body_of(data, "checkpoint", "x.json"), "x.json")


def test_documents_come_back_as_they_were() -> None:
    assert whole(manifests.dump(WHOLE)) == WHOLE
    data = manifests.dump_shard(SHARD)
    assert manifests.parse_shard(manifests.body_of(data, "shard", "x.json"), "x.json") == SHARD


def body() -> dict[str, Any]:
    return dict(json.loads(manifests.dump(WHOLE).partition(b"\n")[2]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", -1),
        ("version", 1.5),
        ("version", 10**400),
        ("version", 13),
        ("bucket_bytes", 1 << 40),
        ("shards", []),
        ("shards", {}),
        ("shards", [{"name": "../../etc/passwd", "size": 1, "sha256": DIGEST}]),
        ("model", {"optimizer": "SGD", "groups": [], "buffers": []}),
        ("model", {"optimizer": "__import__", "groups": [], "buffers": []}),
        ("model", {"optimizer": "SGD", "groups": [{"tensors": [["w", [1 << 60], "float32"]], "hyper": {}}]}),
        ("model", None),
        ("sections", {"roster": 3}),
        ("created", "now"),
    ],
)
def test_value_that_cannot_be_right_is_refused_with_the_name_of_the_file(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"x\.json"):
        manifests.parse(json.dumps({**body(), key: value}).encode(), "x.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "NaN", '{"version": Infinity}', "9" * 10_000, "", "\0", '"\\ud800"'])
def test_json_that_trips_parsers_is_refused(text: str) -> None:
    for parse in (manifests.parse, manifests.parse_shard):
        with pytest.raises(CheckpointError, match=r"x\.json"):
            parse(text.encode(), "x.json")


@pytest.mark.parametrize(
    "name", ["v12", "v000000000000", "v000000000012 ", "x000000000012", "v000000000012.refused", ""]
)
def test_folder_of_another_name_is_no_checkpoint(name: str) -> None:
    assert manifests.version_of(name) is None


def test_folder_of_a_version_is_found_again() -> None:
    for version in (1, 12, 10**13):
        assert manifests.version_of(manifests.folder_of(version)) == version


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    for kind in ("checkpoint", "shard"):
        with pytest.raises(CheckpointError):
            manifests.body_of(data, kind, "x.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=400)
@given(st.data())
def test_any_value_in_any_place_gives_a_document_or_a_refusal(data: st.DataObject) -> None:
    document: Any = body() if data.draw(st.booleans()) else json.loads(manifests.dump_shard(SHARD).partition(b"\n")[2])
    parse = manifests.parse if "model" in document else manifests.parse_shard
    inside: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
        if isinstance(inside[key], dict | list) and inside[key] and data.draw(st.booleans()):
            inside = inside[key]
            continue
        inside[key] = data.draw(JSON)
        break
    with contextlib.suppress(CheckpointError):
        parse(json.dumps(document).encode(), "x.json")
