"""The Dockerfiles and the manifests mean the same image. (No image is built here: there is no Docker.)"""

from __future__ import annotations

import re

import pytest

from roundhouse.kubernetes import mounts
from tests.k8s.manifests import ROOT, Objects, command, pods

DOCKERFILES = {"build/Dockerfile": False, "build/local-cpu.Dockerfile": True}  # -> whether it has Locust


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_has_what_the_manifests_take_from_it(name: str, full: Objects) -> None:
    text = (ROOT / name).read_text()
    (place,) = re.findall(r"^WORKDIR (\S+)$", text, flags=re.MULTILINE)
    assert place == mounts.IN_IMAGE
    for folder in ("src", "model_repository", "models", "deployments"):
        assert f"COPY {folder} {folder}\n" in text
    assert f"ENV PATH={place}/.venv/bin:$PATH\n" in text  # `roundhouse`, `python3`, `locust`
    assert set(re.findall(r"^USER (\d+):\d+$", text, flags=re.MULTILINE)) >= {
        str(pod.spec["securityContext"]["runAsUser"]) for pod in pods(full)
    }


def test_the_load_tests_files_are_in_its_image(full: Objects) -> None:
    (job,) = [pod for pod in pods(full) if "load-test" in pod.name]
    (path,) = [a.split("=")[1] for a in command(job.containers[0]) if a.startswith("--locustfile=")]
    assert (ROOT / path.removeprefix(f"{mounts.IN_IMAGE}/")).is_file()
    text = (ROOT / "build/local-cpu.Dockerfile").read_text()
    assert "COPY loadtests loadtests\n" in text
    assert "[cpu,bench]" in text


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_there_and_not_ignored(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (?!--)(.+) \S+$", (ROOT / name).read_text(), flags=re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert f"!{source.split('/')[0]}" in ignored, source
