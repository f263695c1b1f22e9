"""The shipped overlay is what `roundhouse render k8s` writes today."""

from __future__ import annotations

from pathlib import Path

from roundhouse import deployment, kubernetes

ROOT = Path(__file__).parents[2]


def test_the_shipped_overlay_is_rendered(tmp_path: Path) -> None:
    local = deployment.load(ROOT / "deployments/local-cpu.yaml")
    kubernetes.render(local, tmp_path / "overlay", image="roundhouse:local", trtllm_version="unknown")
    shipped = ROOT / "k8s/overlays/local-cpu"
    for written in (tmp_path / "overlay").iterdir():
        if written.name != "kustomization.yaml":  # its paths start at the folder
            assert written.read_text() == (shipped / written.name).read_text()
