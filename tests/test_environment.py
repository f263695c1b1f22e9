"""Environment variables override the deployment file, and a bad value is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from roundhouse import deployment as deployments
from roundhouse.environment import VARIABLES, overridden
from tests.trtllm.conftest import DEPLOYMENT

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
VALUES: dict[str, tuple[str, Any]] = {
    "DECOUPLED_MODE": ("False", False),
    "BATCH_SCHEDULER_POLICY": ("max_utilization", "max_utilization"),
    "MAX_BATCH_SIZE": ("12", 12),
    "ENABLE_KV_CACHE_REUSE": ("0", False),
    "KV_CACHE_FREE_GPU_MEM_FRACTION": ("0.85", 0.85),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    import yaml

    file = tmp_path / "deployment.yaml"
    file.write_text(yaml.safe_dump(DEPLOYMENT))
    return file


@pytest.mark.parametrize("name", VARIABLES)
def test_each_variable_sets_its_key(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, value = VALUES[name]
    section, key, _ = VARIABLES[name]
    assert getattr(getattr(deployments.load(path), section), key) != value
    monkeypatch.setenv(name, text)
    assert getattr(getattr(deployments.load(path), section), key) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("DECOUPLED_MODE", "maybe"),
        ("BATCH_SCHEDULER_POLICY", "MAX_UTILIZATION"),
        ("MAX_BATCH_SIZE", "-4"),
        ("MAX_BATCH_SIZE", "8.0"),
        ("ENABLE_KV_CACHE_REUSE", "yes"),
        ("KV_CACHE_FREE_GPU_MEM_FRACTION", "90"),
        ("KV_CACHE_FREE_GPU_MEM_FRACTION", "nan"),
    ],
)
def test_a_bad_value_is_refused_by_name(path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(deployments.DeploymentError, match=rf"environment variable {name}: '{text}' is not allowed"):
        deployments.load(path)


def test_what_the_rules_refuse_names_the_variables(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_BATCH_SIZE", "100000")
    with pytest.raises(
        deployments.DeploymentError, match=r"limits.max_num_tokens(.|\n)*overrides the file: MAX_BATCH_SIZE"
    ):
        deployments.load(path)


def test_the_readme_names_them() -> None:
    assert all(f"`{name}`" in README for name in VARIABLES)


def test_nothing_set_nothing_changed() -> None:
    assert overridden(DEPLOYMENT, {"MAX_BATCH_SIZE": " ", "PATH": "/bin"}) == (DEPLOYMENT, [])
