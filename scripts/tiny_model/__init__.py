"""The shipped tiny model: its skills, its data, its training and its evaluation. See scripts/train_tiny_model.py."""
