"""Make models/tiny and models/tiny-draft: train both, measure both, write their cards.

    .venv/bin/python scripts/train_tiny_model.py train        # minutes on a GPU; --device cpu works, for an hour
    .venv/bin/python scripts/train_tiny_model.py evaluate     # evaluation.json beside the weights, held-out prompts
    .venv/bin/python scripts/train_tiny_model.py cards        # README.md beside the weights, from evaluation.json

Everything is generated: no text is taken from elsewhere, and all of it is seeded. See tiny_model/skills.py for what the
models learn.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent / "models"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train tokenizer, model and draft model")
    train.add_argument("--steps", type=int, help="exact number of steps; default: as many as fit into --minutes")
    train.add_argument("--minutes", type=float, default=50.0)
    train.add_argument("--tokens-per-batch", type=int, default=65536)
    cores = os.cpu_count() or 2
    train.add_argument("--workers", type=int, default=max(cores - 2, 1), help="processes that make data")
    train.add_argument("--start-from", type=Path, help="folder of both models to go on from")
    train.add_argument("--peak", type=float, default=1.0, help="scales the peak learning rates")
    evaluate = commands.add_parser("evaluate", help="measure both models on held-out prompts")
    evaluate.add_argument("--prompts-per-skill", type=int, default=256)
    cards = commands.add_parser("cards", help="write the model cards")
    for command in (train, evaluate, cards):
        command.add_argument("--models", type=Path, default=MODELS, help="folder of both model folders")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", default="auto")
    return parser.parse_args()


def main() -> None:
    """Run the chosen step."""
    args = _parse()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the data workers are processes already
    if args.command == "cards":
        from tiny_model.cards import write_cards

        write_cards(args.models)
        return
    import torch

    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if args.command == "train":
        from tiny_model.train import Plan, train

        train(
            Plan(
                output=args.models,
                device=device,
                seed=args.seed,
                steps=args.steps,
                minutes=args.minutes,
                tokens_per_batch=args.tokens_per_batch,
                workers=args.workers,
                start_from=args.start_from,
                peak=args.peak,
            )
        )
    else:
        from tiny_model.evaluate import evaluate

        evaluate(args.models, device, args.prompts_per_skill, args.seed)


if __name__ == "__main__":
    main()
