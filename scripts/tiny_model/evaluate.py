"""Figures of the trained models on held-out prompts, written to evaluation.json beside the weights."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from tiny_model import architecture, skills, stories
from tiny_model.data import CONTEXT
from tiny_model.tokenizer import ASSISTANT_ID, BOS_ID, END_ID, EOS_ID, PAD_ID, USER_ID

END_IDS = (EOS_ID, END_ID)
DRAFT_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Question:
    """`ids`: the prompt as the model gets it, raw or as a chat. `expected`: ids of the answer with its end token."""

    prompt: str
    ids: list[int]
    expected: list[int]


def ask(tokenizer: Tokenizer, pair: skills.Sample, *, chat: bool) -> Question:
    """The ids of a prompt, as a raw completion or a chat of one turn, and those of its answer."""
    prompt, answer = (tokenizer.encode(text, add_special_tokens=False).ids for text in pair)
    if chat:
        return Question(pair.prompt, [BOS_ID, USER_ID, *prompt, END_ID, ASSISTANT_ID], [*answer, END_ID])
    return Question(pair.prompt, [BOS_ID, *prompt], [*answer, EOS_ID])


def draw_questions(tokenizer: Tokenizer, skill: str, count: int, seed: int) -> list[Question]:
    """Held-out questions of a skill, every other one as a chat; what does not fit into the context is left out."""
    rng = random.Random(f"evaluate/{seed}/{skill}")
    questions: list[Question] = []
    while len(questions) < count:
        question = ask(tokenizer, skills.sample(skill, rng), chat=len(questions) % 2 == 1)
        if len(question.ids) + len(question.expected) <= CONTEXT:
            questions.append(question)
    return questions


@torch.inference_mode()
def generate(
    model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 0.0
) -> list[list[int]]:
    """Answers of a batch, each cut after its first end token; temperature 0 is greedy."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), PAD_ID)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=PAD_ID,
        eos_token_id=list(END_IDS),
        **sampling,
    )
    return [_until_end(row) for row in output[:, width:].tolist()]


def _until_end(ids: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in END_IDS), len(ids) - 1)
    return ids[: end + 1]


def answers(model: LlamaForCausalLM, questions: Sequence[Question]) -> list[list[int]]:
    """Greedy answers.

    One pass over prompt and expected answer tells whether greedy decoding gives just that answer: it does when every
    token of it is the model's first choice after those before it. Only where it is not does the model have to generate,
    up to the length of the expected answer.
    """
    result = []
    for question in questions:
        if all(choices_match(model, question.ids, question.expected)):
            result.append(question.expected)
        else:
            result += generate(model, [question.ids], len(question.expected))
    return result


@torch.inference_mode()
def choices_match(model: LlamaForCausalLM, prompt: Sequence[int], answer: Sequence[int]) -> list[bool]:
    """Per token of the answer: whether it is the model's first choice after the prompt and the tokens before it."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits
    return (logits[0, :-1].argmax(-1) == ids[0, len(prompt) :]).tolist()


def accepted_lengths(matches: Sequence[bool], draft_tokens: int) -> list[tuple[int, int]]:
    """(proposed, accepted) of each round of greedy speculative decoding.

    `matches[i]`: whether the draft model, given the target's first i tokens, proposes the target's token i. While its
    proposals match, they are the target's own tokens, so a round accepts as many as match in a row. The target then
    adds one token itself.
    """
    rounds = []
    position = 0
    while position < len(matches):
        proposed = min(draft_tokens, len(matches) - position)
        window = matches[position : position + proposed]
        accepted = window.index(False) if False in window else proposed
        rounds.append((proposed, accepted))
        position += accepted + 1
    return rounds


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 2)


def exact_rates(
    model: LlamaForCausalLM, questions: dict[str, list[Question]]
) -> tuple[dict[str, Any], dict[str, list[list[int]]]]:
    """Per skill and overall: exact answers in percent; and the answers themselves."""
    rates: dict[str, Any] = {}
    given: dict[str, list[list[int]]] = {}
    for skill, asked in questions.items():
        given[skill] = answers(model, asked)
        right = sum(ids == question.expected for ids, question in zip(given[skill], asked, strict=True))
        tokens = sum(len(question.expected) for question in asked)
        rates[skill] = {
            "prompts": len(asked),
            "exact": right,
            "exact_percent": _percent(right, len(asked)),
            "mean_answer_tokens": round(tokens / len(asked), 1),
        }
        print(f"  {skill}: {right}/{len(asked)}", flush=True)
    right = sum(rate["exact"] for rate in rates.values())
    total = sum(rate["prompts"] for rate in rates.values())
    return {
        "overall": {"prompts": total, "exact": right, "exact_percent": _percent(right, total)},
        "skills": rates,
    }, given


def acceptance(
    draft: LlamaForCausalLM, questions: dict[str, list[Question]], given: dict[str, list[list[int]]]
) -> dict[str, Any]:
    """Per skill and overall: acceptance rate of the draft's tokens against the target's greedy answers."""
    per_skill: dict[str, Any] = {}
    everything: list[tuple[int, int]] = []
    for skill, asked in questions.items():
        rounds = [
            pair
            for question, ids in zip(asked, given[skill], strict=True)
            for pair in accepted_lengths(choices_match(draft, question.ids, ids), DRAFT_TOKENS)
        ]
        per_skill[skill] = _acceptance_of(rounds)
        everything += rounds
    return {"draft_tokens": DRAFT_TOKENS, "overall": _acceptance_of(everything), "skills": per_skill}


def _acceptance_of(rounds: Sequence[tuple[int, int]]) -> dict[str, float]:
    proposed, accepted = (sum(column) for column in zip(*rounds, strict=True))
    return {
        "proposed": proposed,
        "accepted": accepted,
        "acceptance_percent": _percent(accepted, proposed),
        "mean_accepted_per_round": round(accepted / len(rounds), 2),
    }


def open_ended(model: LlamaForCausalLM, tokenizer: Tokenizer, count: int, seed: int) -> dict[str, Any]:
    """How the open-ended skill fares when sampled at temperature 1."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    prompts = [stories.draw_open(rng) for _ in range(count)]
    ids = [[BOS_ID, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in prompts]
    texts = [tokenizer.decode(answer) for answer in generate(model, ids, 96, temperature=1.0)]
    valid = sum(stories.is_valid_open(prompt, text) for prompt, text in zip(prompts, texts, strict=True))
    return {
        "temperature": 1.0,
        "prompts": count,
        "valid_percent": _percent(valid, count),
        "distinct_percent": _percent(len(set(texts)), count),
        "example": texts[0],
    }


def _load(folder: Path, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def _write(folder: Path, result: dict[str, Any]) -> None:
    result = {**result, "training": json.loads((folder / "training.json").read_text(encoding="utf-8"))}
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    (folder / "evaluation.json").write_text(text, encoding="utf-8")


def evaluate(output: Path, device: str, prompts_per_skill: int, seed: int) -> None:
    """Measure both models of the folder `output` and write their evaluation.json."""
    tokenizer = Tokenizer.from_file(str(output / architecture.TINY / "tokenizer.json"))
    questions = {skill: draw_questions(tokenizer, skill, prompts_per_skill, seed) for skill in skills.EXACT_SKILLS}
    about = {"split": "held-out", "decoding": "greedy", "seed": seed, "prompts_per_skill": prompts_per_skill}
    folder = output / architecture.TINY
    model = _load(folder, device, torch.float32)
    print("tiny, float32:", flush=True)
    rates, given = exact_rates(model, questions)
    print(f"overall: {rates['overall']}\ntiny, bfloat16:", flush=True)
    half, _ = exact_rates(_load(folder, device, torch.bfloat16), questions)
    print(f"overall: {half['overall']}\ntiny-draft, float32:", flush=True)
    _write(
        folder,
        {"model": architecture.TINY, **about, "float32": rates, "bfloat16": half}
        | {"open_ended": open_ended(model, tokenizer, prompts_per_skill, seed)},
    )
    draft = _load(output / architecture.DRAFT, device, torch.float32)
    own, _ = exact_rates(draft, questions)
    accepted = acceptance(draft, questions, given)
    print(f"overall: {own['overall']}; acceptance: {accepted['overall']}", flush=True)
    _write(
        output / architecture.DRAFT,
        {"model": architecture.DRAFT, "target": architecture.TINY, **about, "float32": own, "acceptance": accepted},
    )
