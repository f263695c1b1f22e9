"""The image's Dockerfile: what can be held to without building it."""

from __future__ import annotations

import json
import re
import runpy
import tomllib
from pathlib import Path

from roundhouse.trtllm.commands import TENSORRT_LLM

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "build/Dockerfile").read_text()
SURFACE = json.loads((ROOT / "tests/doubles/trtllm_cli.json").read_text())


def test_it_is_the_image_that_the_commands_are_written_for() -> None:
    assert f"ARG IMAGE={SURFACE['image']}\n" in DOCKERFILE
    assert f"ARG TENSORRT_LLM={TENSORRT_LLM}\n" in DOCKERFILE


def test_it_is_taken_by_a_digest_that_must_be_given() -> None:
    assert "\nARG DIGEST\nFROM ${IMAGE}@${DIGEST} AS serve\n" in DOCKERFILE


def test_each_stage_ends_as_a_user_without_rights() -> None:
    for stage in DOCKERFILE.split("\nFROM ")[1:-1]:
        assert re.findall(r"^USER (.+)$", stage, flags=re.MULTILINE)[-1] == "10001:10001"
    assert DOCKERFILE.rstrip().endswith("FROM serve")


def test_what_it_copies_is_there_and_is_sent_to_the_builder() -> None:
    sources = [
        word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, flags=re.MULTILINE) for word in line.split()[:-1]
    ]
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert len(sources) > 8
    for source in sources:
        assert (ROOT / source).exists()
        assert source.split("/")[0] in sent


def test_dependencies_are_named_without_versions() -> None:
    names = runpy.run_path(str(ROOT / "build/requirements.py"))["names"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = names(project)
    assert len(found) == len(project["dependencies"])
    assert {"numpy", "transformers", "tritonclient[grpc,http]"} <= set(found)
    assert all(re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?", name) for name in found)
