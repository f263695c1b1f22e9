"""A tensor parallel engine in leader mode: mpirun, here a stand-in, starts its ranks; rank 0 is the engine process."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import yaml

from roundhouse import deployment as deployments
from roundhouse.engine import launch
from tests.doubles.engines import DOUBLES, write_engine
from tests.engine_process.conftest import TINY, Join, Side, request
from tests.trtllm.conftest import deployment


@pytest.fixture
def two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A deployment of two GPUs, and the way to the stand-ins."""
    monkeypatch.setenv("PYTHONPATH", str(DOUBLES))
    monkeypatch.setenv("PATH", f"{DOUBLES / 'bin'}:{os.environ['PATH']}")
    write_engine(tmp_path / "engine", Path(TINY), ranks=2)
    path = tmp_path / "deployment.yaml"
    made = {
        "model": {"path": TINY},
        "engine": {"kind": "tensorrt_llm", "path": "engine"},
        "precision": {"weights": "fp8", "kv_cache": "fp8"},
        "limits": {"max_batch_size": 8, "max_seq_len": 1024, "queue": 8},
        "gpu": {"product": "NVIDIA-H200", "count": 2, "tensor_parallel": 2},
    }
    path.write_text(yaml.safe_dump(made))
    return path


def ranks_of(side: Side) -> list[psutil.Process]:
    return [child for child in side.engine().children() if "roundhouse.engine.host" in " ".join(child.cmdline())]


def test_two_ranks_answer_as_one_and_die_with_mpirun(two_ranks: Path, join: Join) -> None:
    side = join()
    assert side.engine().cmdline()[1].endswith("mpirun")
    ranks = ranks_of(side)
    assert len(ranks) == 2
    assert len(side.ask(request(1))) == 8
    side.engine().kill()  # as the keeper does with an engine that hangs
    side.until(lambda: not side.client.connected)
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
    side.until(lambda: side.client.connected, 60)
    assert len(side.ask(request(2))) == 8


def test_a_rank_that_dies_takes_the_others_with_it(two_ranks: Path, join: Join) -> None:
    side = join()
    first, second = ranks_of(side)
    second.kill()
    assert psutil.wait_procs([first], timeout=20)[1] == []
    side.until(lambda: not side.client.connected)  # the keeper starts it again, as above


def test_only_leader_mode_needs_mpirun(two_ranks: Path) -> None:
    assert launch.ranks(deployments.load(two_ranks)) == 2
    assert launch.command(2, two_ranks, Path("/f"), 7)[:5] == [
        "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2",
    ]  # fmt: skip
    assert launch.ranks(deployment()) == 1
    both = {"gpu": {"count": 2, "tensor_parallel": 2}}
    assert launch.ranks(deployment(**both)) == 2
    assert launch.ranks(deployment(**both, engine={"launch": "orchestrator"})) == 1


def test_two_engines_cannot_be_led() -> None:
    from tests.trtllm.conftest import SPECULATIVE

    both = {"gpu": {"count": 2, "tensor_parallel": 2}, "speculative": SPECULATIVE}
    with pytest.raises(deployments.DeploymentError, match=r"engine.launch: leader runs one engine"):
        deployment(**both)
    deployment(**both, engine={"launch": "orchestrator"})
