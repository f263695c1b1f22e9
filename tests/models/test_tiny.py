"""The shipped models: small enough, truly trained, and described by the figures that were measured."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from tiny_model import cards, evaluate, skills
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

MODELS = Path(__file__).parents[2] / "models"
TINY, DRAFT = MODELS / "tiny", MODELS / "tiny-draft"
PER_SKILL = 4


def size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def questions(tokenizer: Tokenizer) -> list[evaluate.Question]:
    """Short ones, so that CPUs answer them in seconds; another seed than that of the evaluation."""
    drawn = (evaluate.draw_questions(tokenizer, skill, PER_SKILL, seed=77) for skill in skills.EXACT_SKILLS)
    return [question for question in itertools.chain.from_iterable(drawn) if len(question.expected) <= 100]


def test_the_files_are_small() -> None:
    assert size(TINY) <= 8_000_000
    assert size(DRAFT) * 4 <= size(TINY)


def test_the_context_is_long_enough() -> None:
    for folder in (TINY, DRAFT):
        assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] >= 2048


def test_both_have_the_same_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (TINY / name).read_bytes() == (DRAFT / name).read_bytes()


@pytest.mark.parametrize("text", ["naïve", "太阳 🚂🚂", "שלום عالم", "e\u0301 👩‍👩‍👧", " \t\n x", "0123"])
def test_the_tokenizer_gives_back_what_it_got(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_the_chat_template_makes_what_the_model_was_trained_on(tokenizer: Tokenizer) -> None:
    prompt = skills.sample("sort", random.Random(1))
    chat = AutoTokenizer.from_pretrained(TINY).apply_chat_template(
        [{"role": "user", "content": prompt.prompt}], add_generation_prompt=True, return_dict=False
    )
    assert chat == evaluate.ask(tokenizer, prompt, chat=True).ids


@pytest.mark.parametrize("folder", [TINY, DRAFT], ids=["tiny", "tiny-draft"])
def test_the_card_says_what_was_measured(folder: Path) -> None:
    assert (folder / "README.md").read_text(encoding="utf-8") == cards.render(folder)


def test_the_measured_rates_are_high() -> None:
    evaluation = json.loads((TINY / "evaluation.json").read_text())
    assert evaluation["split"] == "held-out"
    for dtype in ("float32", "bfloat16"):
        assert evaluation[dtype]["overall"]["exact_percent"] >= 95


def test_held_out_prompts_are_answered(
    tiny: LlamaForCausalLM, questions: list[evaluate.Question], tokenizer: Tokenizer
) -> None:
    given = evaluate.answers(tiny, questions)
    wrong = [
        (question.prompt, tokenizer.decode(answer))
        for question, answer in zip(questions, given, strict=True)
        if answer != question.expected
    ]
    assert len(questions) > 40
    assert len(wrong) <= 0.05 * len(questions), wrong


def test_the_draft_model_guesses_what_the_model_says(
    tiny: LlamaForCausalLM, questions: list[evaluate.Question]
) -> None:
    draft = LlamaForCausalLM.from_pretrained(DRAFT, dtype=torch.float32).eval()
    matches = [
        match for question in questions for match in evaluate.choices_match(draft, question.ids, question.expected)
    ]
    assert sum(matches) / len(matches) > 0.9


def test_nothing_held_out_was_trained_on() -> None:
    rng = random.Random(5)
    prompts = [skills.sample(skill, rng, "train").prompt for skill in skills.EXACT_SKILLS for _ in range(50)]
    assert not any(skills.is_held_out(prompt) for prompt in prompts)
