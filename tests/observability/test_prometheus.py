"""Prometheus itself beside a running job: it accepts the rules, alerts fire when they should, the board has data."""

import json
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_ps
from tests.support.jobs import Servers, job
from tests.support.processes import Child
from torch_ps.ps.job.worker_metrics import Workers
from torch_ps.ps.observability.shard_metrics import Metrics

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
BOARD = json.loads((ROOT / "deploy/grafana/torch-ps.json").read_text(encoding="utf-8"))
SECONDS = 60.0
LEASE = 4.0

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="Debian's prometheus is not installed"
)


def queries() -> list[str]:
    """Every query of the board, with its variables filled in."""
    found = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", ())]
    return [each.replace("$__rate_interval", "4s").replace("$job", ".*") for each in found]


def own_metrics() -> set[str]:
    """Names of the samples that a shard can show."""
    metrics, workers = Metrics(), Workers()
    workers.lead = True
    metrics.registry.register(workers)
    names = set()
    for family in metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_sum", "_count", "_bucket"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return names


def test_alerts_and_board_ask_for_metrics_that_exist() -> None:
    text = ALERTS.read_text(encoding="utf-8") + " ".join(queries())
    named = set(re.findall(r"\b(?:ps|process)_[a-z_]+", text))
    assert len(named) > 20
    assert named <= own_metrics()


def test_every_metric_is_documented_and_nothing_else_is() -> None:
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(ps_[a-z_]+)", text, re.MULTILINE))
    own = {re.sub(r"_(sum|count|bucket)$", "", name) for name in own_metrics() if name.startswith("ps_")}
    assert documented == own


def test_every_panel_says_what_it_shows() -> None:
    panels = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
    assert len(panels) == len({panel["title"] for panel in panels}) >= 16
    assert all(panel["description"].endswith(".") for panel in panels)


@needs_prometheus
@pytest.mark.parametrize("file", ["alerts.yml", "prometheus.yml"])
def test_promtool_accepts_the_files(file: str) -> None:
    what = "rules" if file == "alerts.yml" else "config"
    command = ["promtool", "check", what, str(ALERTS.with_name(file))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_alerts_fire_on_figures_that_are_wrong_and_on_no_others() -> None:
    command = ["promtool", "test", "rules", str(Path(__file__).with_name("alerts.test.yml"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A server of its own that scrapes a job every half second."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        alerts = ALERTS.read_text(encoding="utf-8")
        (folder / "alerts.yml").write_text(alerts, encoding="utf-8")
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": ["alerts.yml"],
            "scrape_configs": [{"job_name": "torch-ps", "static_configs": [{"targets": targets}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        self._log, self._address = (folder / "log").open("wb"), ""
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stdout=self._log,
            stderr=self._log,
        )
        listening = re.compile(r'"Listening on" address=(\S+)')
        self._address = self.until(lambda: listening.findall((folder / "log").read_text()), "it listens")[0]

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=SECONDS) as reply:
            return json.load(reply)["data"]

    def result(self, query: str) -> Any:
        return self.ask("query", query=query)["result"]

    def until(self, true: Callable[[], Any], what: str) -> Any:
        """Ask again until the answer is not empty; each time takes half a second, the time of a scrape."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                if found := true():
                    return found
            except OSError:
                assert self._process.poll() is None, "prometheus has ended"
            assert time.monotonic() < deadline, f"after {SECONDS:g} s not yet: {what}"
            try:
                self._process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue

    def close(self) -> None:
        self._process.kill()
        self._process.wait(SECONDS)
        self._log.close()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Servers, list[Child]]]:
    """Two workers that push for ever to two shards, asynchronously, and a Prometheus that looks on."""
    folder = tmp_path_factory.mktemp("prometheus")
    with job(mode="async", workers=2, shards=2, lease=LEASE, bucket_size=0.001) as servers:
        names = ("w0", "w1")
        function = "tests.support.workers:push_for_ever"
        workers = [Child(function, (str(servers), name, 1000), folder / f"{name}.log") for name in names]
        prometheus = Prometheus(folder, servers.metrics)
        try:
            yield prometheus, servers, workers
        finally:
            prometheus.close()
            for worker in workers:
                worker.kill()


@needs_prometheus
def test_every_query_of_the_board_returns_data(watched: tuple[Prometheus, Servers, list[Child]]) -> None:
    prometheus, _, _ = watched
    count = "sum(rate(ps_worker_samples_total[4s]) > 0)"
    prometheus.until(lambda: prometheus.ask("query", query=count)["result"], "samples of both workers")
    for query in queries():
        prometheus.until(partial(prometheus.result, query), query)


@needs_prometheus
def test_an_alert_fires_when_a_worker_is_stopped(watched: tuple[Prometheus, Servers, list[Child]]) -> None:
    prometheus, _, workers = watched

    def firing(name: str) -> list[dict[str, Any]]:
        alerts = prometheus.ask("alerts")["alerts"]
        return [each for each in alerts if each["labels"]["alertname"] == name and each["state"] == "firing"]

    prometheus.until(lambda: prometheus.ask("query", query="ps_worker_silent_seconds < 1")["result"], "a first look")
    assert not firing("PsWorkerSilent")
    workers[1].send(signal.SIGSTOP)
    (alert,) = prometheus.until(lambda: firing("PsWorkerSilent"), "PsWorkerSilent fires")
    assert alert["labels"]["worker"] == "w1"
    assert "worker w1 of torch-ps is silent for" in alert["annotations"]["summary"]
    assert prometheus.until(lambda: firing("PsWorkerLost"), "PsWorkerLost fires")
    assert not firing("PsNonFiniteGradients")


def test_figures_of_workers_agree_with_what_they_pushed() -> None:
    with job(workers=1) as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.zeros(3)}, torch_ps.OptimizerSpec("SGD", lr=0.1))
        client.pull()
        for _ in range(4):
            client.push({"x": torch.ones(3)}, weight=8)
        with urllib.request.urlopen(f"http://{servers.metrics[0]}/metrics", timeout=SECONDS) as page:
            text = page.read().decode()
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["ps_absorbed_samples"]) == 32
    assert float(figures['ps_worker_samples_total{worker="w0"}']) == 32
    assert float(figures['ps_worker_clock{worker="w0"}']) == 4
    assert float(figures['ps_worker_pushed_bytes_total{worker="w0"}']) == 4 * 12
    assert float(figures['ps_worker_connected{worker="w0"}']) == 1
    assert float(figures['ps_worker_waiting_seconds{worker="w0"}']) == 0
    assert re.search(r'^ps_info\{mode="sync",shard="0",shards="1",version=".+"\} 1.0$', text, re.MULTILINE)
