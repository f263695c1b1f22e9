"""Training of both models at once, on the same batches."""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

from tiny_model import architecture
from tiny_model.data import CONTEXT, IGNORED, Batch, PackedBatches
from tiny_model.tokenizer import save_tokenizer, train_tokenizer

_PEAK_LR = {architecture.TINY: 2e-3, architecture.DRAFT: 3e-3}
_WARM_UP_STEPS = 200
_RATE_STEPS = 150  # steps after which the rate is known and a time budget becomes a number of steps
_MAX_STEPS = 100_000


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train.

    `steps` or, where it is None, `minutes` (turned into steps once the rate is known) ends it. `start_from`: a folder
    of both models to go on from, tokenizer included. `peak` scales the peak learning rates.
    """

    output: Path
    device: str
    seed: int
    steps: int | None
    minutes: float
    tokens_per_batch: int
    workers: int
    start_from: Path | None = None
    peak: float = 1.0


class Learner:
    """One model with its optimizer."""

    def __init__(self, name: str, plan: Plan) -> None:
        self.name = name
        self.model = architecture.create(name, plan.seed)
        if plan.start_from is not None:
            weights = load_file(plan.start_from / name / "model.safetensors")
            self.model.load_state_dict(weights, strict=False)  # the output layer is tied, hence not in the file
        self.model.to(plan.device)
        self._autocast = (
            torch.autocast("cuda", dtype=torch.bfloat16) if plan.device.startswith("cuda") else nullcontext()
        )
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        kept = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            groups, lr=_PEAK_LR[name], betas=(0.9, 0.98), eps=1e-9, fused=plan.device.startswith("cuda")
        )

    def step(self, input_ids: torch.Tensor, labels: torch.Tensor, lr_factor: float) -> torch.Tensor:
        """One update; returns the loss, still on the device."""
        for group in self._optimizer.param_groups:
            group["lr"] = _PEAK_LR[self.name] * lr_factor
        with self._autocast:
            hidden = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state
            learnt = labels != IGNORED
            logits = self.model.lm_head(hidden[learnt])
        loss = functional.cross_entropy(logits.float(), labels[learnt])
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        return loss.detach()


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 0."""
    if step < _WARM_UP_STEPS:
        return (step + 1) / _WARM_UP_STEPS
    done = (step - _WARM_UP_STEPS) / max(steps - _WARM_UP_STEPS, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def train(plan: Plan) -> None:
    """Train tokenizer, model and draft model, and write both folders under `plan.output`."""
    torch.set_float32_matmul_precision("high")
    start = plan.start_from
    tokenizer = (
        Tokenizer.from_file(str(start / architecture.TINY / "tokenizer.json")) if start else train_tokenizer(plan.seed)
    )
    learners = [Learner(name, plan) for name in (architecture.TINY, architecture.DRAFT)]
    for learner in learners:
        save_tokenizer(tokenizer, plan.output / learner.name, CONTEXT)
    steps, seconds = _train(plan, learners, tokenizer.to_str())
    for learner in learners:
        architecture.save(learner.model, learner.name, plan.output / learner.name)
        _write_record(plan, learner, steps, seconds)


def _train(plan: Plan, learners: list[Learner], tokenizer_json: str) -> tuple[int, float]:
    steps = plan.steps or _MAX_STEPS
    batches = PackedBatches(tokenizer_json, plan.seed, steps, plan.tokens_per_batch)
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=plan.workers,
        prefetch_factor=8 if plan.workers else None,
        pin_memory=plan.device.startswith("cuda"),
    )
    start = time.perf_counter()
    rate_from = 0.0
    progress = tqdm(total=plan.steps, mininterval=10, unit="step")
    for step, batch in enumerate(loader):
        if step >= steps:
            break
        if plan.steps is None and step == _WARM_UP_STEPS - _RATE_STEPS:
            rate_from = time.perf_counter()
        if plan.steps is None and step == _WARM_UP_STEPS:
            per_step = (time.perf_counter() - rate_from) / _RATE_STEPS
            steps = step + int((plan.minutes * 60 - (time.perf_counter() - start)) / per_step)
            progress.total = steps
            print(f"{per_step * 1e3:.1f} ms a step: {steps} steps in {plan.minutes} minutes", flush=True)
        losses = _step(learners, batch, plan.peak * lr_factor(step, steps), plan.device)
        progress.update()
        if step % 250 == 0:
            shown = ", ".join(
                f"{learner.name} {loss.item():.4f}" for learner, loss in zip(learners, losses, strict=True)
            )
            print(f"step {step}, {time.perf_counter() - start:.0f} s, loss: {shown}", flush=True)
    return steps, time.perf_counter() - start


def _step(learners: list[Learner], batch: Batch, factor: float, device: str) -> list[torch.Tensor]:
    input_ids = batch.input_ids.to(device, non_blocking=True)
    labels = batch.labels.to(device, non_blocking=True)
    return [learner.step(input_ids, labels, factor) for learner in learners]


def _write_record(plan: Plan, learner: Learner, steps: int, seconds: float) -> None:
    on_gpu = plan.device.startswith("cuda")
    record = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "minutes_for_both_models": round(seconds / 60, 1),
        "parameters": sum(parameter.numel() for parameter in learner.model.parameters()),
        "peak_learning_rate": plan.peak * _PEAK_LR[learner.name],
        "seed": plan.seed,
        "steps": steps,
        "tokens": steps * plan.tokens_per_batch,
        "tokens_per_batch": plan.tokens_per_batch,
        "torch": torch.__version__,
    }
    before = plan.start_from and json.loads(
        (plan.start_from / learner.name / "training.json").read_text(encoding="utf-8")
    )
    path = plan.output / learner.name / "training.json"
    path.write_text(json.dumps([*(before or []), record], indent=2) + "\n", encoding="utf-8")
