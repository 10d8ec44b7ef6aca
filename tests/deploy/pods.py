"""What a cluster would do with the manifests, as far as one host can: environment, volumes, commands.

    kubectl kustomize --> Manifests --> Pod(index): variables, command --place()--> runs on 127.0.0.1

Source: https://kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables/
"""

import base64
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.launched import ROOT

KUBERNETES = ROOT / "deploy/kubernetes"
INDEX = ("pod-index", "job-completion-index")

Manifest = dict[str, Any]


def kustomized(folder: Path, overlay: str, own: str = "") -> list[Manifest]:
    """Build an overlay from a copy of ours with a token in it; ``own`` is the text of one more, named "own"."""
    copy = folder / "kubernetes"
    if not copy.exists():
        shutil.copytree(KUBERNETES, copy, ignore=shutil.ignore_patterns("token"))
        (copy / "base/token").write_text("a-token-of-this-test\n")
    if own:
        (copy / "overlays/own").mkdir()
        (copy / "overlays/own/kustomization.yaml").write_text(own)
    command = ["kubectl", "kustomize", str(copy / "overlays" / overlay)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    return list(yaml.safe_load_all(built.stdout))


def kustomize_missing() -> str:
    """Why no overlay can be built here; empty: it can."""
    if shutil.which("kubectl") is None:
        return "needs kubectl, for kustomize"
    version = subprocess.run(
        ["kubectl", "version", "--client"], capture_output=True, text=True, timeout=60, check=False
    )
    found = re.search(r"Kustomize Version: v([0-9]+)", version.stdout)
    return "" if found and int(found[1]) >= 5 else "needs kubectl with kustomize 5"


def only(manifests: list[Manifest], kind: str, name: str = "") -> Manifest:
    (found,) = (m for m in manifests if m["kind"] == kind and (not name or m["metadata"]["name"] == name))
    return found


@dataclass(frozen=True)
class Container:
    """One container of the pod with an index, on this host."""

    spec: Manifest
    manifests: list[Manifest]
    index: int
    place: dict[str, str]  # texts of the cluster, and what stands for them here

    @property
    def variables(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in self.spec.get("envFrom", []):
            found |= only(self.manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
        for each in self.spec.get("env", []):
            if "value" in each:
                found[each["name"]] = each["value"]
            else:
                path = each["valueFrom"]["fieldRef"]["fieldPath"]
                assert any(path.endswith(f"{index}']") for index in INDEX), path
                found[each["name"]] = str(self.index)
        return {name: self._placed(value) for name, value in found.items()}

    @property
    def command(self) -> list[str]:
        """As the container runtime starts it."""
        return [self._placed(each) for each in [*self.spec["command"], *self.spec.get("args", [])]]

    def _placed(self, text: str) -> str:
        for there, here in self.place.items():
            text = text.replace(there, here)
        return text


def mounted(manifests: list[Manifest], secret: str, folder: Path) -> Path:
    """A Secret as a volume has it."""
    folder.mkdir()
    for name, value in only(manifests, "Secret", secret)["data"].items():
        (folder / name).write_bytes(base64.b64decode(value))
    return folder
