"""scripts/prove-trtllm, over the stand-ins: what it compares, runs and reports."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trtllm_proof import __main__ as proving
from trtllm_proof import deployments, installed, report, stages, surface

from roundhouse import deployment as parsing
from roundhouse.trtllm import toolchain
from roundhouse.trtllm.toolchain import Gpu

ROOT = Path(__file__).resolve().parents[2]
DOUBLES = ROOT / "tests/doubles"
TOOLS = DOUBLES / "trtllm_tools"
H200 = Gpu("NVIDIA H200", "9.0")


@pytest.fixture(scope="module")
def stand_ins() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{TOOLS / 'bin'}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(DOUBLES))
        for name in ("FAKE_GPUS", "FAKE_FAULT", "FAKE_REWRITE", "ROUNDHOUSE_ENGINE_PYTHON"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def tools(stand_ins: None) -> toolchain.Toolchain:
    return toolchain.find(TOOLS / "examples")


@pytest.fixture
def site(tmp_path: Path, tools: toolchain.Toolchain) -> stages.Site:
    return stages.Site(tools, TOOLS / "examples", tmp_path, quick=True)


# --- the surface ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("surface")


@pytest.fixture(scope="module")
def compared(tools: toolchain.Toolchain, folder: Path) -> stages.Found:
    """The stage, run once."""
    return stages.compare_surface(stages.Site(tools, TOOLS / "examples", folder, quick=True))


@pytest.fixture(scope="module")
def found(compared: stages.Found, folder: Path) -> dict[str, Any]:
    """What installed.py says of the stand-ins."""
    result: dict[str, Any] = json.loads((folder / "surface.json").read_text())
    return result


def test_the_stand_ins_have_the_recorded_surface(compared: stages.Found, found: dict[str, Any]) -> None:
    assert compared.details == ["0 things are not as recorded, 0 are new"]
    assert Path(compared.data["file"]).is_relative_to(DOUBLES)
    assert len(found["executor"]["classes"]) > 50
    assert len(found["cli"]["trtllm-build"]) > 60


def parameter(found: dict[str, Any], cls: str, name: str) -> dict[str, Any]:
    (match,) = [p for p in found["executor"]["classes"][cls]["constructors"][0] if p["name"] == name]
    return match


CHANGES: dict[str, tuple[str, str]] = {
    "version": ("changed", "version"),
    "class gone": ("missing", "OutputConfig"),
    "parameter gone": ("missing", "KvCacheConfig(host_cache_size)"),
    "parameter new": ("new", "KvCacheConfig(dtype)"),
    "order": ("changed", "SchedulerConfig order"),
    "None refused": ("changed", "ExecutorConfig(max_batch_size) takes None"),
    "default": ("changed", "ExecutorConfig(enable_chunked_context) default"),
    "keyword only": ("changed", "KvCacheConfig(use_uvm) kw_only"),
    "method gone": ("missing", "Executor.cancel_request"),
    "field gone": ("missing", "Result.output_token_ids"),
    "enum value": ("changed", "FinishReason.LENGTH"),
    "enum new": ("new", "FinishReason.TIRED"),
    "flag gone": ("missing", "trtllm-build --multiple_profiles"),
    "flag new": ("new", "trtllm-build --turbo"),
    "choice gone": ("missing", "quantize.py --qformat fp8"),
    "flag default": ("changed", "trtllm-build --max_batch_size default"),
}


def change(found: dict[str, Any], what: str) -> None:
    classes, enums, cli = found["executor"]["classes"], found["executor"]["enums"], found["cli"]
    build = {argument["flag"]: argument for argument in cli["trtllm-build"]}
    match what:
        case "version":
            found["version"] = "1.2.2"
        case "class gone":
            del classes["OutputConfig"]
        case "parameter gone":
            classes["KvCacheConfig"]["constructors"][0].remove(parameter(found, "KvCacheConfig", "host_cache_size"))
        case "parameter new":
            classes["KvCacheConfig"]["constructors"][0].append({"name": "dtype", "type": "str", "default": "auto"})
        case "order":
            classes["SchedulerConfig"]["constructors"][0].reverse()
        case "None refused":
            parameter(found, "ExecutorConfig", "max_batch_size")["type"] = "int"
        case "default":
            parameter(found, "ExecutorConfig", "enable_chunked_context")["default"] = True
        case "keyword only":
            del parameter(found, "KvCacheConfig", "use_uvm")["kw_only"]
        case "method gone":
            del classes["Executor"]["methods"]["cancel_request"]
        case "field gone":
            classes["Result"]["members"].remove("output_token_ids")
        case "enum value":
            enums["FinishReason"]["LENGTH"] = 7
        case "enum new":
            enums["FinishReason"]["TIRED"] = 9
        case "flag gone":
            cli["trtllm-build"].remove(build["--multiple_profiles"])
        case "flag new":
            cli["trtllm-build"].append({"flag": "--turbo", "type": "flag"})
        case "choice gone":
            next(a for a in cli["quantize.py"] if a["flag"] == "--qformat")["choices"].remove("fp8")
        case "flag default":
            build["--max_batch_size"]["default"] = 4096


@pytest.mark.parametrize("what", CHANGES)
def test_each_difference_is_reported(found: dict[str, Any], what: str) -> None:
    changed = copy.deepcopy(found)
    change(changed, what)
    kind, where = CHANGES[what]
    assert (kind, where) in [(each.kind, each.where) for each in surface.compare(stages.recorded(), changed)]


def test_nanobind_signatures_are_read() -> None:
    text = (
        r"def __init__(self, a: collections.abc.Sequence[int], b: dict[str, int] | None = \0, *, c: bool = \1) -> None"
    )
    assert installed.parameters(text, (None, False)) == [
        {"name": "a", "type": "collections.abc.Sequence[int]", "required": True},
        {"name": "b", "type": "dict[str, int] | None", "default": None},
        {"name": "c", "type": "bool", "kw_only": True, "default": False},
    ]
    odd = installed.parameters("def f(self, x: std::vector<int, std::allocator<int> >, y: str = 'a, b=(') -> int")
    assert [p["name"] for p in odd] == ["x", "y"]


# --- the stages -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    file = tmp_path / "test_sample.py"
    file.write_text(
        "import os, pytest\n"
        "def test_good(): assert os.environ['GIVEN'] == 'yes'\n"
        "def test_bad(): assert 1 + 1 == 3\n"
        "def test_not_here(): pytest.skip('no')\n"
    )
    return file


def test_a_suite_is_counted(site: stages.Site, tests: Path) -> None:
    good = stages.suite(site, "good", [str(tests), "-k", "good"], GIVEN="yes")
    assert good.details == ["1 passed, 0 failed, 0 skipped"]
    with pytest.raises(stages.StageError) as failure:
        stages.suite(site, "all", [str(tests)], GIVEN="yes")
    assert failure.value.details[0] == "1 passed, 1 failed, 1 skipped"
    assert "test_sample::test_bad: assert (1 + 1) == 3" in failure.value.details[1]


@pytest.mark.parametrize("gpu", [H200, Gpu("NVIDIA L40S", "8.9"), Gpu("NVIDIA A100", "8.0")])
def test_its_deployments_are_valid_and_eight_bits_are_for_gpus_that_have_them(tmp_path: Path, gpu: Gpu) -> None:
    chosen = deployments.deployments(ROOT / "models", tmp_path, gpu)
    assert ("tiny-fp8" in chosen) == (gpu.compute_capability != "8.0")
    for raw in (*chosen.values(), deployments.conformance(tmp_path, gpu)):
        parsing.parse(raw, source="proof", base=tmp_path)


def test_calibration_data_has_the_column_that_quantize_reads(tmp_path: Path) -> None:
    deployments.write_calibration(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == deployments.CALIBRATION_TEXTS
    assert all(len(row["text"]) > 5 for row in rows)


@pytest.mark.server
def test_a_built_engine_is_served_and_answers(site: stages.Site) -> None:
    """The way of a deployment through everything: quantise, compile, load behind the gate, Triton, exact answers."""
    deployments.write_calibration(site.output / "calibration")
    raw = deployments.deployments(ROOT / "models", site.output, H200)["tiny-fp8"]
    file = proving.write(site.output / "tiny-fp8.yaml", raw)
    assert stages.build(site, file).details[0].startswith("FP8, KV cache FP8, ")
    result = stages.accuracy(site, file, 90.0)
    assert result.data["prompts"] == 16
    with pytest.raises(stages.StageError, match=r"the gate|compute capability|tokens_per_block"):
        stages.build(site, proving.write(file, {**raw, "gpu": {"product": "NVIDIA-L40S"}}))


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch, compared: stages.Found) -> None:
    """Suites and servers only say that they ran; the surface is not read again; the random model is not random."""

    def ran(site: stages.Site, name: Any, *arguments: Any, **environment: str) -> stages.Found:
        return stages.Found(["1 passed"], {"environment": environment})

    def copied(site: stages.Site, folder: Path, head_size: int) -> None:
        shutil.copytree(ROOT / "models/tiny", folder)

    monkeypatch.setattr(stages, "suite", ran)
    monkeypatch.setattr(stages, "accuracy", ran)
    monkeypatch.setattr(stages, "compare_surface", lambda site: compared)
    monkeypatch.setattr(stages, "write_random_model", copied)


@pytest.mark.usefixtures("rehearsed")
def test_everything_runs_and_a_stand_in_proves_nothing(site: stages.Site) -> None:
    done = proving.prove(site)
    assert {stage.outcome for stage in done} == {"passed"}
    names = [stage.name for stage in done]
    for name in ("tiny", "tiny-fp8", "tiny-drafted"):
        assert {f"build-{name}", f"contract-{name}", f"accuracy-{name}"} <= set(names)
    given = next(stage for stage in done if stage.name == "conformance").data["environment"]
    assert given == {"ROUNDHOUSE_TEST_ENGINE": str(site.output / "engines/conformance")}
    assert report.verdict(done, quick=False, stand_in=True) == "stand-in"
    assert report.verdict(done, quick=False, stand_in=False) == "proven"
    assert report.verdict(done, quick=True, stand_in=False) == "incomplete"


@pytest.mark.usefixtures("rehearsed")
def test_a_failure_skips_what_needs_it_and_nothing_else(site: stages.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(site: stages.Site, file: Path) -> stages.Found:
        if file.stem == "tiny":
            raise stages.StageError("no valid tactics", "see the | log")
        raise OSError("disk on fire")

    monkeypatch.setattr(stages, "build", failing)
    done = proving.prove(site)
    outcomes = {stage.name: stage.outcome for stage in done}
    assert outcomes["surface"] == outcomes["random-model"] == "passed"
    assert outcomes["build-tiny"] == outcomes["build-tiny-fp8"] == "failed"
    assert outcomes["contract-tiny"] == outcomes["conformance"] == "skipped"
    assert report.verdict(done, quick=False, stand_in=False) == "failed"
    page = report.as_markdown({"GPUs": "none | really"}, done, "failed")
    assert "| build-tiny | failed | 0 | no valid tactics |" in page
    assert r"- see the \| log" in page
    assert "| build-tiny-fp8 | failed | 0 | OSError: disk on fire |" in page
    assert r"| GPUs | none \| really |" in page
    assert report.as_json({}, done, "failed")["stages"][0]["name"] == "surface"


def test_without_tensorrt_llm_it_says_where_to_run(tmp_path: Path) -> None:
    asked = subprocess.run(
        [ROOT / "scripts/prove-trtllm", "--output", tmp_path / "proof", "--examples", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 1
    assert "run this in the image of build/" in asked.stderr
    assert not (tmp_path / "proof").exists()
