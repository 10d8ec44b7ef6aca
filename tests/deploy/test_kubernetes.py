"""The manifests of deploy/kubernetes: the schemas accept them, they agree with each other, and their commands train."""

import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.launched import LEARNED, ROOT, Started, accuracies, environment, free_port
from tests.deploy.pods import Container, Manifest, kustomize_missing, kustomized, mounted, only
from tests.support.certificates import Authority
from tests.support.jobs import SECONDS, Addresses, until
from torch_ps.common.rpc.credentials import access_of

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, of the extra dev")
pytestmark = pytest.mark.skipif(bool(kustomize_missing()), reason=kustomize_missing())

VERSION = "1.34"
#: Kinds of operators, of which the validator has no schema: what the tests below ask of them has to do.
FOREIGN = {"PodMonitor", "Certificate", "Issuer"}


def own_overlay() -> str:
    """The one that the docs show."""
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/machines/kubernetes.md").read_text(), re.S | re.M)
    return str(text)


def template(manifests: list[Manifest], kind: str) -> Manifest:
    pod: Manifest = only(manifests, kind)["spec"]["template"]
    return pod


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "mtls", "own"])
def test_schemas_accept_every_manifest_strictly(overlay: str, tmp_path: Path) -> None:
    manifests = kustomized(tmp_path, overlay, own_overlay() if overlay == "own" else "")
    for manifest in manifests:
        if manifest["kind"] not in FOREIGN:
            kubernetes_validate.validate(manifest, VERSION, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):  # it is able to say no
        kubernetes_validate.validate(only(manifests, "StatefulSet") | {"replica": 2}, VERSION, strict=True)


@pytest.mark.parametrize("overlay", ["gpu", "mtls"])
def test_manifests_agree_with_each_other(overlay: str, tmp_path: Path) -> None:
    manifests = kustomized(tmp_path, overlay)
    options = only(manifests, "ConfigMap")["data"]
    servers, job = only(manifests, "StatefulSet"), only(manifests, "Job")
    names = [address.split(":")[0] for address in options["PS_SERVERS"].split(",")]
    service = servers["spec"]["serviceName"]
    assert names == [f"{servers['metadata']['name']}-{i}.{service}" for i in range(servers["spec"]["replicas"])]
    assert (options["SHARDS"], options["PS_LEAD"]) == (str(len(names)), options["PS_SERVERS"].split(",")[0])
    assert {options["PS_WORKERS"]} == {str(job["spec"][each]) for each in ("completions", "parallelism")}

    ports = {port["name"] for port in template(manifests, "StatefulSet")["spec"]["containers"][0]["ports"]}
    policy = only(manifests, "NetworkPolicy", "torch-ps-servers")
    assert {p["port"] for rule in policy["spec"]["ingress"] for p in rule["ports"]} == ports
    assert only(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"] in ports
    labels = template(manifests, "StatefulSet")["metadata"]["labels"]
    assert labels[only(manifests, "PodMonitor")["spec"]["jobLabel"]] == "torch-ps"  # as deploy/prometheus has it
    selectors = [
        *(only(manifests, kind, "torch-ps-servers")["spec"] for kind in ("PodDisruptionBudget", "Service")),
        only(manifests, "PodMonitor")["spec"],
        servers["spec"],
    ]
    assert all(s["selector"].get("matchLabels", s["selector"]).items() <= labels.items() for s in selectors)

    for kind in ("StatefulSet", "Job"):
        pod = template(manifests, kind)["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["image"] == f"registry.example.com/torch-ps:{'cuda' if overlay == 'gpu' else 'cpu'}"
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    worker = template(manifests, "Job")["spec"]["containers"][0]
    assert worker["resources"]["limits"].get("nvidia.com/gpu") == (1 if overlay == "gpu" else None)

    if overlay == "mtls":
        certificates = {m["spec"]["secretName"]: m["spec"] for m in manifests if m["kind"] == "Certificate"}
        assert certificates["torch-ps-server-tls"]["dnsNames"] == names
        wanted = {v["secret"]["secretName"] for k in ("StatefulSet", "Job") for v in secrets(manifests, k)}
        assert wanted - {"torch-ps-token"} == certificates.keys() - {"torch-ps-ca"}
        issuers = {m["metadata"]["name"] for m in manifests if m["kind"] == "Issuer"}
        assert {spec["issuerRef"]["name"] for spec in certificates.values()} == issuers


def secrets(manifests: list[Manifest], kind: str) -> list[dict[str, Any]]:
    return [volume for volume in template(manifests, kind)["spec"]["volumes"] if "secret" in volume]


@pytest.mark.timeout(600)
def test_the_very_commands_train_with_mutual_tls_and_go_on_when_pods_are_killed_or_drained(tmp_path: Path) -> None:
    manifests = kustomized(tmp_path, "own", own_overlay())
    names = only(manifests, "ConfigMap")["data"]["PS_SERVERS"].split(",")
    listen, metrics = ([f"127.0.0.1:{free_port()}" for _ in names] for _ in range(2))
    authority = Authority(tmp_path)
    folders = {"/run/torch-ps": mounted(manifests, "torch-ps-token", tmp_path / "secret"), "/checkpoints": tmp_path}
    for role in ("server", "worker"):  # what cert-manager would put there
        tls = authority.issue(role)
        folders[f"/run/tls/{role}"] = tmp_path / role
        (tmp_path / role).mkdir()
        for name, path in (("ca.crt", tls.ca), ("tls.crt", tls.cert), ("tls.key", tls.key)):
            (tmp_path / role / name).write_bytes(Path(path).read_bytes())
    everywhere = dict(zip(names, listen, strict=True)) | {there: str(here) for there, here in folders.items()}
    running: list[Started] = []

    def start(kind: str, index: int, part: str = "containers") -> Started:
        role = "server" if kind == "StatefulSet" else "worker"
        own = {"0.0.0.0:50051": listen[index % 2], "0.0.0.0:9090": metrics[index % 2]} if role == "server" else {}
        place = {"/run/tls": f"/run/tls/{role}"} | everywhere | own
        container = Container(template(manifests, kind)["spec"][part][0], manifests, index, place)
        log = tmp_path / f"{role}-{index}-{part}-{len(running)}.log"
        often = {
            "PS_CHECKPOINT_SECONDS": "1",
            "PS_LEASE": "60",
        }  # of which the first is soon there, and nobody gives up
        running.append(Started(container.command, log, environment(**{**container.variables, **often})))
        return running[-1]

    try:
        servers = [start("StatefulSet", index) for index in range(2)]
        assert start("Job", 0, "initContainers").wait(3 * SECONDS) == 0
        for container in template(manifests, "StatefulSet")["spec"]["containers"]:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                for address in metrics:
                    path = container[probe]["httpGet"]["path"]
                    assert urllib.request.urlopen(f"http://{address}{path}", timeout=SECONDS).status == 200
        first, second = (start("Job", index) for index in range(2))
        ca, cert, key = (str(tmp_path / "worker" / name) for name in ("ca.crt", "tls.crt", "tls.key"))
        access = access_of(ca, cert, key, str(tmp_path / "secret/token"), insecure=False)
        lead = Addresses(listen, access=access)
        until(
            lambda: first.ends_within(0.2) or (len(lead.status().worker) == 2 and "is good" in servers[0].said),
            "both train, and a checkpoint is there",
            3 * SECONDS,
        )
        servers[1].kill()
        servers[1] = start("StatefulSet", 1)  # as the StatefulSet's controller does for each that has ended
        assert servers[0].wait() == 1
        assert "shard 1 was started anew, so all servers have to start together again" in servers[0].said
        servers[0] = start("StatefulSet", 0)
        until(
            lambda: first.ends_within(0.2) or servers[0].said.count("is good") > 0,
            "the same workers train",
            3 * SECONDS,
        )
        assert "goes on from version" in servers[0].said
        hook = template(manifests, "Job")["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        drain = Started([each.replace(" 1", f" {second.pid}") for each in hook], tmp_path / "drain.log", environment())
        running.append(drain)
        assert second.wait() == 0
        assert "has finished its step and leaves" in second.said
        again = start("Job", 1)  # as the Job's controller does for an index that has not succeeded
        assert (first.wait(3 * SECONDS), again.wait()) == (0, 0)
        assert drain.wait() == 0
        assert "worker w1 joins" in servers[0].said  # the one before it was known by the checkpoint
        assert "mutual TLS, with token" in servers[0].said
        assert accuracies(first.said)[-1] >= LEARNED
        for server in servers:
            server.send(15)
        assert [server.wait() for server in servers] == [0, 0]
        assert "is good" in servers[0].said  # the last checkpoint
    except BaseException as error:
        for each in running:
            error.add_note(each.said)
        raise
    finally:
        for each in running:
            each.kill()
