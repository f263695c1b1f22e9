"""`roundhouse build` from end to end over the stand-ins of the tools: what it makes, reuses, refuses, cleans up."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from roundhouse import deployment as deployments
from roundhouse.trtllm import build as building
from roundhouse.trtllm import engine_folder, gate, step
from tests.trtllm.conftest import DEPLOYMENT, SPECULATIVE

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tests/doubles/trtllm_tools"
EXAMPLES = TOOLS / "examples"
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


LIBRARY = "library/tensorrt_llm"


@pytest.fixture(autouse=True)
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins first on the path, and a TensorRT-LLM for the interpreter to find."""
    monkeypatch.setenv("PATH", f"{TOOLS / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str((tmp_path / LIBRARY).parent))
    for name in ("FAKE_GPUS", "FAKE_FAULT", "FAKE_REWRITE", "ROUNDHOUSE_ENGINE_PYTHON"):
        monkeypatch.delenv(name, raising=False)


def furnish(folder: Path) -> Path:
    """The checkpoints `model` and `draft`, and a TensorRT-LLM of the right version."""
    for name in ("model", "draft"):
        checkpoint(folder / name)
    package = folder / LIBRARY
    package.mkdir(parents=True)
    (package / "version.py").write_text('__version__ = "1.2.1"\n')
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return furnish(tmp_path)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the engine of DEPLOYMENT has been built."""
    folder = furnish(tmp_path_factory.mktemp("built"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{TOOLS / 'bin'}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str((folder / LIBRARY).parent))
        run(folder)
    return folder


@pytest.fixture
def built(tmp_path: Path, built_once: Path) -> Path:
    """A copy of it."""
    shutil.copytree(built_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def run(folder: Path, **changes: Any) -> str:
    """Build, and return what was said."""
    said = io.StringIO()
    building.build(load(folder, **changes), examples=EXAMPLES, console=Console(file=said, soft_wrap=True))
    return said.getvalue()


def checkpoint(path: Path, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**HF_CONFIG, **changes}))
    (path / "model.safetensors").write_bytes(path.name.encode())
    return path


def load(folder: Path, **changes: Any) -> deployments.Deployment:
    raw = {
        section: {**DEPLOYMENT.get(section, {}), **changes.get(section, {})} for section in {**DEPLOYMENT, **changes}
    }
    (folder / "deployment.yaml").write_text(yaml.safe_dump(raw))
    return deployments.load(folder / "deployment.yaml")


def leftovers(folder: Path) -> set[str]:
    """What lies there besides checkpoints, tools and deployment."""
    return {path.name for path in folder.iterdir()} - {"model", "draft", "library", "deployment.yaml"}


def test_builds_an_engine_with_logs_and_a_manifest(folder: Path) -> None:
    said = run(folder)
    engine = engine_folder.read(folder / "engine")
    manifest = engine.manifest
    assert manifest is not None
    assert (engine.quant_algo, engine.kv_cache_quant_algo, engine.paged_context_fmha) == ("FP8", "FP8", True)
    assert (manifest.tensorrt_llm, manifest.compute_capability, manifest.gpu) == ("1.2.1", "9.0", "NVIDIA H200")
    assert set(manifest.files) == {"config.json", "rank0.engine"}
    assert manifest.files["rank0.engine"] == engine.rank_files["rank0.engine"]
    assert set(manifest.seconds) == {"quantise", "compile"}
    assert "{checkpoint}" in manifest.commands[1]
    assert leftovers(folder) == {"engine", "engine.lock", "engine.logs"}
    log = (folder / "engine.logs/compile.log").read_text()
    assert log.startswith("$ ")
    assert "--max_batch_size 16" in log
    assert "building rank 0" in log
    assert f"{folder}/engine: built; logs in {folder}/engine.logs" in said
    gate.enforce(engine, gate.wanted(load(folder)), version="1.2.1", compute_capability="9.0")


def test_builds_for_two_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_GPUS", "NVIDIA H200, 9.0; NVIDIA H200, 9.0")
    run(folder, gpu={"count": 2, "tensor_parallel": 2}, engine={"fusions": True})
    engine = engine_folder.read(folder / "engine")
    assert (engine.world_size, set(engine.rank_files)) == (2, {"rank0.engine", "rank1.engine"})
    assert engine.reduce_fusion


def test_examples_may_be_named_from_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    building.build(load(folder), examples=Path("examples"), console=Console(file=io.StringIO()))


def test_builds_the_draft_too(folder: Path) -> None:
    run(folder, speculative=SPECULATIVE)
    target, draft = (engine_folder.read(folder / name) for name in ("engine", "draft-engine"))
    assert target.speculative_mode is engine_folder.SpeculativeMode.DRAFT_TOKENS_EXTERNAL
    assert (target.max_draft_len, target.max_seq_len) == (5, 1024 + 5)
    assert draft.speculative_mode is engine_folder.SpeculativeMode.NONE
    assert json.loads((folder / "draft-engine/rank0.engine").read_text())["model"] == str(folder / "draft")


@pytest.mark.parametrize(
    ("weights", "kv_cache", "found"),
    [
        ("bfloat16", "auto", (None, None, True)),
        ("bfloat16", "fp8", (None, "FP8", False)),
        ("int4_awq", "fp8", ("W4A16_AWQ", "FP8", False)),
        ("int4_awq", "auto", ("W4A16_AWQ", None, True)),
    ],
)
def test_builds_other_precisions(folder: Path, weights: str, kv_cache: str, found: tuple[Any, ...]) -> None:
    shares = kv_cache == "auto"
    run(
        folder,
        precision={"weights": weights, "kv_cache": kv_cache},
        kv_cache={"reuse": shares},
        scheduling={"chunked_prefill": shares},
    )
    engine = engine_folder.read(folder / "engine")
    assert (engine.quant_algo, engine.kv_cache_quant_algo, engine.paged_context_fmha) == found


# --- reuse ------------------------------------------------------------------------------------------------------------


def built_at(folder: Path) -> int:
    return (folder / "engine/rank0.engine").stat().st_mtime_ns


def test_the_same_inputs_reuse_the_engine(built: Path) -> None:
    first = built_at(built)
    os.utime(built / "model/model.safetensors")  # as a copy or a fetch would
    assert "is up to date" in run(built)
    assert "is up to date" in run(built, limits={"queue": 7})  # not compiled in
    assert built_at(built) == first


@pytest.mark.parametrize("change", ["weights", "limits", "damage"])
def test_other_inputs_build_it_again(built: Path, change: str) -> None:
    first = built_at(built)
    changes: dict[str, Any] = {}
    if change == "weights":
        (built / "model/model.safetensors").write_bytes(b"trained further")
    elif change == "limits":
        changes = {"limits": {"max_batch_size": 32}}
    else:
        (built / "engine/rank0.engine").write_bytes(b"cut")
    said = run(built, **changes)
    assert (
        "copy the folder again; it is built again" if change == "damage" else "a new engine will replace it"
    ) in said
    assert built_at(built) != first
    assert leftovers(built) == {"engine", "engine.lock", "engine.logs"}
    assert "is up to date" in run(built, **changes)


def test_another_gpu_builds_it_again(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_GPUS", "NVIDIA L40S, 8.9")
    assert "a new engine will replace it" in run(built, gpu={"product": "NVIDIA-L40S"})
    manifest = engine_folder.read(built / "engine").manifest
    assert manifest is not None
    assert manifest.compute_capability == "8.9"


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("quantize:crash", "target: quantise: failed with code 1 after 0:0"),
        ("quantize:disk-full", "the disk is full: free some space"),
        ("trtllm-build:crash", "    RuntimeError: Assertion failed: no valid tactics"),
        ("trtllm-build:disk-full", "the disk is full: free some space"),
        ("trtllm-build:out-of-memory", "most likely for want of memory"),
        ("trtllm-build:truncate", "rank0.engine: has 0 bytes"),
    ],
)
def test_a_failed_step_leaves_the_engine_as_it_was(
    built: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    before = (built_at(built), (built / "engine/manifest.json").read_bytes())
    monkeypatch.setenv("FAKE_FAULT", fault)
    with pytest.raises(building.BuildError) as refusal:
        run(built, limits={"max_batch_size": 32})
    assert message in str(refusal.value)
    assert f"whole log: {built}/engine.logs/" in str(refusal.value)
    assert (built_at(built), (built / "engine/manifest.json").read_bytes()) == before
    assert leftovers(built) == {"engine", "engine.lock", "engine.logs"}


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        ("use_paged_context_fmha=false", "use_paged_context_fmha is off in the engine, since"),
        ("remove_input_padding=false", "in-flight batching needs packed input"),
        ("kv_cache_quant_algo=null", "precision.kv_cache: kv_cache_quant_algo is None in the engine"),
        ("max_seq_len=512", "limits.max_seq_len: the engine was compiled for 512, and 1,024 is wanted"),
    ],
)
def test_what_was_changed_in_silence_fails_the_build(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rewrite: str, message: str
) -> None:
    monkeypatch.setenv("FAKE_REWRITE", rewrite)
    with pytest.raises(building.BuildError) as refusal:
        run(folder)
    assert message in str(refusal.value)
    assert "the engine was compiled, and is not kept" in str(refusal.value)
    assert leftovers(folder) == {"engine.lock", "engine.logs"}


def test_the_wrong_gpu_is_refused_before_anything_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_GPUS", "NVIDIA L40S, 8.9")
    with pytest.raises(building.BuildError, match=r"gpu\.product: NVIDIA-H200 has compute capability 9\.0.*8\.9"):
        run(folder)
    monkeypatch.setenv("FAKE_GPUS", "NVIDIA H200, 9.0")
    with pytest.raises(building.BuildError, match=r"gpu\.tensor_parallel: 2 GPUs are needed to compile"):
        run(folder, gpu={"count": 2, "tensor_parallel": 2})
    assert leftovers(folder) == set()
    monkeypatch.setenv("FAKE_GPUS", "NVIDIA H100 80GB HBM3, 9.0")
    assert "note: tuned for NVIDIA H100 80GB HBM3, which is not NVIDIA-H200" in run(folder)


def test_what_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(**changes: Any) -> str:
        with pytest.raises(building.BuildError) as refused:
            run(folder, **changes)
        return str(refused.value)

    version = folder / "library/tensorrt_llm/version.py"
    version.write_text('__version__ = "1.1.0"')
    assert "tensorrt_llm: 1.1.0 is installed, and builds are written for 1.2.1" in refusal()
    shutil.rmtree(version.parent)
    assert "does not have it; run this in the image of build/" in refusal()
    monkeypatch.setenv("PATH", "/nowhere")
    assert "trtllm-build: not found" in refusal()
    assert "hf download OWNER/absent --local-dir" in refusal(model={"path": "absent"})


def test_checkpoints_that_quantize_would_not_take_are_refused(folder: Path) -> None:
    checkpoint(folder / "model", quantization_config={"quant_method": "fp8"})
    with pytest.raises(building.BuildError, match="is quantised already; give the checkpoint in 16 bits"):
        run(folder)
    checkpoint(folder / "model", auto_map={"AutoModel": "modeling.Mine"})
    with pytest.raises(building.BuildError, match=r"model\.trust_remote_code: .* has Python code of its own"):
        run(folder)
    checkpoint(folder / "model")
    (folder / "draft/model.safetensors").unlink()
    with pytest.raises(building.BuildError, match=r"draft: has no \*\.safetensors"):
        run(folder, speculative=SPECULATIVE)


def test_a_folder_of_something_else_is_not_replaced(folder: Path) -> None:
    (folder / "engine").mkdir()
    (folder / "engine/thesis.txt").touch()
    with pytest.raises(building.BuildError, match="is there and is not an engine; choose another"):
        run(folder)
    assert (folder / "engine/thesis.txt").exists()


def test_too_little_room_is_refused_with_both_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))  # type: ignore[attr-defined]
    with pytest.raises(building.BuildError, match=r"0\.0 GB are free, and the build needs 0\.0 GB"):
        run(folder)
    assert leftovers(folder) == {"engine.lock"}


def test_what_does_not_fit_the_gpus_is_refused_before_hours_are_spent(folder: Path) -> None:
    checkpoint(folder / "model", hidden_size=65536, num_hidden_layers=200, intermediate_size=262144)
    with pytest.raises(building.BuildError, match=r"gpu\.tensor_parallel: 1 x NVIDIA-H200 cannot hold"):
        run(folder)


# --- interruptions and two at once ------------------------------------------------------------------------------------


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    load(folder)
    command = [sys.executable, "-m", "roundhouse.cli", "build", str(folder / "deployment.yaml")]
    return subprocess.Popen(
        [*command, "--examples", str(EXAMPLES)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def compiling(folder: Path) -> Callable[[], bool]:
    log = folder / "engine.logs/compile.log"
    return lambda: log.exists() and "timing tactics" in log.read_text()


def holders(folder: Path) -> list[int]:
    """Processes that have the lock file open."""
    target = str(folder / "engine.lock")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if any(os.readlink(link) == target for link in (entry / "fd").iterdir()):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_sigterm_ends_what_runs_and_removes_what_is_half_done(folder: Path) -> None:
    process = start(folder, FAKE_FAULT="trtllm-build:hang")
    wait_for(compiling(folder))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert leftovers(folder) == {"engine.lock", "engine.logs"}
    assert holders(folder) == []


def test_after_a_kill_the_next_build_waits_for_what_still_runs_and_starts_over(folder: Path) -> None:
    first = start(folder, FAKE_FAULT="trtllm-build:hang")
    wait_for(compiling(folder))
    first.kill()
    first.communicate(timeout=60)
    (orphan,) = holders(folder)
    assert "engine.building" in leftovers(folder)
    second = start(folder)
    assert second.stdout is not None
    assert f"waiting for another build of {folder}/engine (process {first.pid} on " in second.stdout.readline()
    assert not (folder / "engine").exists()
    os.kill(orphan, signal.SIGKILL)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert leftovers(folder) == {"engine", "engine.lock", "engine.logs"}


def test_of_two_builds_at_once_one_builds_and_the_other_takes_its_engine(folder: Path) -> None:
    both = [start(folder), start(folder)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("engine: built" in each for each in said) == 1
    assert sum("is up to date" in each for each in said) == 1


def test_an_engine_that_was_being_replaced_when_the_machine_died_comes_back(built: Path) -> None:
    (built / "engine").rename(built / "engine.replaced")
    assert "is up to date" in run(built)
    assert leftovers(built) == {"engine", "engine.lock", "engine.logs"}


def test_the_command_line_reports_refusals_in_one_line(folder: Path) -> None:
    process = start(folder, FAKE_GPUS="NVIDIA L40S, 8.9")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.startswith("gpu.product: ")
    assert said.count("\n") == 1


def test_progress_is_told_where_there_is_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "PROGRESS_SECONDS", 0.01)
    said = io.StringIO()
    with (tmp_path / "lock").open("w") as lock:
        step.run(
            "compile",
            ["sh", "-c", "echo timing tactics; sleep 0.5"],
            cwd=tmp_path,
            log=tmp_path / "log",
            console=Console(file=said, soft_wrap=True),
            keep_open=lock.fileno(),
        )
    assert "compile: 0:00  timing tactics" in said.getvalue()
    assert "compile: done in 0:0" in said.getvalue()


# --- the stand-ins ----------------------------------------------------------------------------------------------------


def refuses(tool: Path, *arguments: str) -> bool:
    return subprocess.run([sys.executable, str(tool), *arguments], capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize(
    "arguments",
    [
        "--max_batch 8",  # no abbreviations
        "--tp_size 2",  # trtllm-build has none
        "--kv_cache_type PAGED",
        "--max_seq_len long",
        "--multiple_profiles enable --opt_num_tokens 8",
        "--streamingllm enable",
    ],
)
def test_the_stand_in_of_trtllm_build_refuses_what_the_tool_refuses(tmp_path: Path, arguments: str) -> None:
    given = ["--checkpoint_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), *arguments.split()]
    assert refuses(TOOLS / "bin/trtllm-build", *given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", ["--qformat fp9", "--export_path x", "--qformat fp8 --calib_dataset wikitext"])
def test_the_stand_in_of_quantize_refuses_what_the_tool_refuses(folder: Path, arguments: str) -> None:
    given = ["--model_dir", str(folder / "model"), "--output_dir", str(folder / "out"), *arguments.split()]
    assert refuses(EXAMPLES / "quantization/quantize.py", *given)
    assert not (folder / "out").exists()


def test_the_stand_in_turns_off_what_trtllm_build_would(folder: Path) -> None:
    """An FP8 cache without FP8 weights: asked for with paged context attention, built without."""
    quantise = [sys.executable, str(EXAMPLES / "quantization/quantize.py"), "--model_dir", str(folder / "model")]
    quantise += ["--qformat", "int4_awq", "--kv_cache_dtype", "fp8", "--output_dir", str(folder / "checkpoint")]
    subprocess.run(quantise, check=True, capture_output=True)
    compile_ = [str(TOOLS / "bin/trtllm-build"), "--checkpoint_dir", str(folder / "checkpoint")]
    compile_ += ["--use_paged_context_fmha", "enable", "--output_dir", str(folder / "out")]
    subprocess.run(compile_, check=True, capture_output=True, cwd=folder)
    assert not engine_folder.read(folder / "out").paged_context_fmha
