"""The files of deploy/docker: linters and schemas accept them, and the commands of compose.yaml train."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.launched import LEARNED, ROOT, accuracies, environment, free_port, started
from tests.support.jobs import SECONDS, until

DOCKER = ROOT / "deploy/docker"


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return loaded


def checked(*command: str) -> None:
    """Run a checker, of the extra dev or of Debian, or skip where it is not."""
    program = shutil.which(command[0], path=str(Path(sys.executable).parent)) or shutil.which(command[0])
    if program is None:
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_linter_accepts_the_dockerfile() -> None:
    checked("hadolint", str(DOCKER / "Dockerfile"))


def test_schema_accepts_the_compose_files() -> None:
    files = [str(DOCKER / name) for name in ("compose.yaml", "compose.gpu.yaml")]
    checked("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)


def test_prometheus_accepts_its_configuration(tmp_path: Path) -> None:
    text = (DOCKER / "prometheus.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(text)
    shutil.copy(ROOT / "deploy/prometheus/alerts.yml", tmp_path)
    checked("promtool", "check", "config", str(tmp_path / "prometheus.yml"))
    (job,) = yaml.safe_load(text)["scrape_configs"]
    servers = compose()["x-options"]["PS_SERVERS"].replace(":50051", ":9090").split(",")
    assert job["static_configs"][0]["targets"] == servers


def test_parts_of_the_composition_agree() -> None:
    whole = compose()
    services, options = whole["services"], whole["x-options"]
    names = [address.split(":")[0] for address in options["PS_SERVERS"].split(",")]
    assert names == [name for name in services if name.startswith("server-")]
    for index, name in enumerate(names):
        words = shlex.split(services[name]["command"])
        assert words[words.index("--shard") + 1] == f"{index}/{len(names)}"
        assert int(words[words.index("--workers") + 1]) == services["worker"]["deploy"]["replicas"]
        assert services["worker"]["depends_on"][name] == {"condition": "service_healthy"}
    assert options["PS_TOKEN_FILE"] == f"/run/secrets/{next(iter(whole['secrets']))}"
    mounts = [volume.split(":")[0] for name in ("prometheus", "grafana") for volume in services[name]["volumes"]]
    ours = [mount for mount in mounts if mount.startswith(".")]
    assert len(ours) == 4
    assert all((DOCKER / mount).exists() for mount in ours)
    datasource = yaml.safe_load((DOCKER / "grafana/datasources/prometheus.yaml").read_text())["datasources"][0]
    assert datasource["url"] == "http://prometheus:9090"


@pytest.mark.timeout(600)
def test_the_very_commands_of_the_composition_train(tmp_path: Path) -> None:
    whole = compose()
    services, (token,) = whole["services"], whole["secrets"]
    (tmp_path / token).write_text("a-token-of-this-test\n")
    names = [name for name in services if name.startswith("server-")]
    ports = {name: (free_port(), free_port()) for name in names}

    def placed(text: str, name: str = "") -> str:
        for each, (port, _) in ports.items():
            text = text.replace(f"{each}:50051", f"127.0.0.1:{port}")
        if name:
            listen, metrics = ports[name]
            text = text.replace("0.0.0.0:50051", f"127.0.0.1:{listen}").replace(":9090", f":{metrics}")
        return (
            text.replace("/run/secrets", str(tmp_path))
            .replace("/checkpoints", str(tmp_path))
            .replace("0.0.0.0", "127.0.0.1")
        )

    variables = {name: placed(value) for name, value in whole["x-options"].items()}
    servers = {name: (placed(services[name]["command"], name), variables) for name in names}
    healthy = [[placed(word, name) for word in services[name]["healthcheck"]["test"][1:]] for name in names]
    with started(tmp_path, **servers) as running:
        until(
            lambda: running[0].ends_within(0.2) or all("listens on" in server.said for server in running),
            "the servers accept work",
            3 * SECONDS,
        )
        for check in healthy:
            assert subprocess.run(check, env=environment(), timeout=SECONDS, check=False).returncode == 0
        command = placed(services["worker"]["command"])
        replicas = {f"worker-{i}": (command, variables) for i in range(services["worker"]["deploy"]["replicas"])}
        with started(tmp_path, **replicas) as workers:
            assert [worker.wait(3 * SECONDS) for worker in workers] == [0, 0]
            assert accuracies("".join(worker.said for worker in workers))[-1] >= LEARNED
        for server in running:
            server.send(15)
        assert [server.wait() for server in running] == [0, 0]
