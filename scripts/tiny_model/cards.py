"""The model cards, rendered from evaluation.json and from the skills: no figure in them is typed by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny_model import architecture, skills, stories
from tiny_model.data import CONTEXT

_SHOWN = 90  # characters of an example
_FRONT_MATTER = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
"""


def render(folder: Path) -> str:
    """The card of the model in `folder`, from its evaluation.json."""
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = _tiny(evaluation) if evaluation["model"] == architecture.TINY else _draft(evaluation)
    return "\n".join([_FRONT_MATTER, *parts, *_shape(folder, config), *_training(evaluation["training"])])


def write_cards(models: Path) -> None:
    """Write README.md into both model folders under `models`."""
    for name in (architecture.TINY, architecture.DRAFT):
        (models / name / "README.md").write_text(render(models / name), encoding="utf-8")


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines] + [""]


def _code(text: str) -> str:
    """`text` as code in a table cell: on one line, shortened, without what would end the cell."""
    shown = text.replace("\n", "\\n").replace("\t", "\\t").replace("|", "\\|")
    shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"
    return f"`` {shown} ``"


def _tiny(evaluation: dict[str, Any]) -> list[str]:
    overall = evaluation["float32"]["overall"]
    half = evaluation["bfloat16"]["overall"]
    opened = evaluation["open_ended"]
    return [
        "# Roundhouse tiny",
        "",
        "A real little Llama, trained from scratch on prompts that `scripts/tiny_model/` generates; no text is taken",
        "from elsewhere. It is there so that serving can be tested with answers that are right or wrong.",
        "",
        f"**{overall['exact_percent']} % exact answers** ({overall['exact']} of {overall['prompts']})",
        f"on held-out prompts, greedy, in float32; {half['exact_percent']} % in bfloat16. An answer is exact when",
        "every token is right and an end token follows. Held out is one prompt in 16, by its hash: training never saw",
        "them. Half of the prompts are sent raw, half as a chat.",
        "",
        *_skill_table(evaluation),
        "`NAME-long` and `NAME-text` are longer prompts, and ones of any text, in the syntax of NAME. Figures come",
        "from `python scripts/train_tiny_model.py evaluate`, which writes `evaluation.json`.",
        "",
        "## Prompts",
        "",
        "Send a prompt as it is, with or without BOS, or as the user's message through the chat template (system",
        "message and several turns allowed). A raw answer ends with `<|end_of_text|>`, a chat's with `<|end|>`.",
        "",
        *_examples(),
        f"Languages: {', '.join(stories.LANGUAGES)}. Moods: {', '.join(stories.MOODS)}.",
        f"Animals: {', '.join(stories.ANIMALS)}. Places: {', '.join(stories.PLACES)}.",
        "Numbers: to sort, up to ten of 0-99; to add, two of 0-999; to count, from 0-999 up, at most 351 in a row.",
        "",
        "Open-ended: `tell a story about a cat:` has many right answers. At temperature 1,",
        f"{opened['valid_percent']} % of {opened['prompts']} sampled answers are among them, and",
        f"{opened['distinct_percent']} % of all are distinct. One:",
        "",
        f"> {opened['example']}",
        "",
        f"Small talk, learnt by heart: {', '.join(_code(prompt) for prompt in skills.SMALL_TALK)}.",
        "",
        "Anything else is outside of what it knows: it will answer, and the answer means nothing.",
        "",
    ]


def _skill_table(evaluation: dict[str, Any]) -> list[str]:
    half = evaluation.get("bfloat16", {}).get("skills")
    header = ["skill", "prompts", "mean answer tokens", "exact %", *(["exact % in bfloat16"] if half else [])]
    rows = [
        [
            skill,
            rate["prompts"],
            rate["mean_answer_tokens"],
            rate["exact_percent"],
            *([half[skill]["exact_percent"]] if half else []),
        ]
        for skill, rate in evaluation["float32"]["skills"].items()
    ]
    return _table(header, rows)


def _examples() -> list[str]:
    rng = random.Random(1)
    rows = []
    for name, skill in skills.EXACT_SKILLS.items():
        if not name.endswith("-long"):
            prompt, answer = skills.sample(name, rng)
            rows.append([_code(skill.syntax), _code(prompt), _code(answer)])
    return _table(["syntax", "example", "answer"], rows)


def _draft(evaluation: dict[str, Any]) -> list[str]:
    accepted = evaluation["acceptance"]
    overall, own = accepted["overall"], evaluation["float32"]["overall"]
    rows = [
        [
            skill,
            figures["acceptance_percent"],
            figures["mean_accepted_per_round"],
            evaluation["float32"]["skills"][skill]["exact_percent"],
        ]
        for skill, figures in accepted["skills"].items()
    ]
    return [
        "# Roundhouse tiny draft",
        "",
        "The draft model for speculative decoding with `models/tiny`: same tokenizer, same training data.",
        "",
        f"**Acceptance rate {overall['acceptance_percent']} %** ({overall['accepted']} of {overall['proposed']}",
        f"draft tokens; {overall['mean_accepted_per_round']} a round of {accepted['draft_tokens']}) against the greedy",
        f"answers of `models/tiny` on held-out prompts. Alone, it answers {own['exact_percent']} % of them exactly.",
        "",
        *_table(["skill", "acceptance %", "accepted tokens a round", "own exact answers %"], rows),
        "The skills and their prompts: see the card of `models/tiny`.",
        "",
    ]


def _shape(folder: Path, config: dict[str, Any]) -> list[str]:
    size = (folder / "model.safetensors").stat().st_size
    return [
        "## Model",
        "",
        f"`LlamaForCausalLM`, {config['num_hidden_layers']} layers, hidden size {config['hidden_size']},",
        f"{config['num_attention_heads']} query and {config['num_key_value_heads']} KV heads of {config['head_dim']},",
        f"context {CONTEXT} tokens, byte-level BPE of {config['vocab_size']} tokens with every digit a token of its",
        f"own, tied embeddings; bfloat16 weights, {size / 1e6:.2f} MB.",
        "",
    ]


def _training(stages: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            stage["steps"],
            f"{stage['tokens'] / 1e6:.0f} M",
            stage["peak_learning_rate"],
            stage["seed"],
            stage["minutes_for_both_models"],
            stage["device"],
        ]
        for stage in stages
    ]
    return [
        "## Training",
        "",
        f"{stages[0]['parameters']} parameters. `python scripts/train_tiny_model.py train`: AdamW, warm-up and cosine,",
        "loss on answers only, both models on the same batches. Each later stage went on from the one before it",
        "(`--start-from`), with its seed (`--seed`) and a lower peak learning rate (`--peak`).",
        "",
        *_table(["steps", "tokens", "peak learning rate", "seed", "minutes (both models)", "device"], rows),
    ]
