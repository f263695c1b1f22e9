"""Every overlay is rendered and built once a session."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from roundhouse import deployment as deployments
from roundhouse.kubernetes import overlay
from tests.k8s import manifests
from tests.k8s.manifests import Combination, Objects

Built = Callable[[Combination], Objects]


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[Combination, Objects]:
    """Each combination that is shipped, as objects."""
    folder = tmp_path_factory.mktemp("overlays")

    def made(combination: Combination) -> Objects:
        return manifests.build(manifests.render(combination, folder / str(combination)))

    combinations = manifests.combinations()
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(combinations, pool.map(made, combinations), strict=True))


@pytest.fixture(scope="session")
def local_cpu() -> Objects:
    """The overlay that is in the repository."""
    return manifests.build(manifests.ROOT / "k8s/overlays/local-cpu")


@pytest.fixture(scope="session")
def full(everything: dict[Combination, Objects]) -> Objects:
    """The deployment that needs most, with all components but the plain HPA."""
    (found,) = [
        objects
        for combination, objects in everything.items()
        if combination.deployment == "llama-3-70b-2xh100-speculative"
        and len(combination.components) > 4
        and "autoscaling-keda" in combination.components
    ]
    return found


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    """A deployment on two nodes with eight GPUs each."""
    raw = yaml.safe_load((manifests.ROOT / "deployments/llama-3-70b-2xh100.yaml").read_text())
    raw["gpu"] = {**raw["gpu"], "count": 16, "tensor_parallel": 16, "nodes": 2}
    parsed = deployments.parse(raw, source="two nodes", base=manifests.ROOT / "deployments")
    folder = tmp_path_factory.mktemp("group") / "overlay"
    overlay.render(parsed, folder, image=manifests.IMAGE, components=("monitoring", "openai"))
    return manifests.build(folder)
