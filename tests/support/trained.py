"""Small trained models on disk: a run with a checkpoint, and a folder that transformers saved."""

import logging
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from support.tiny import tiny_trainer, train_steps
from switchtitan.training.trainer import Trainer


def train_and_save(folder: Path, method: str, *overrides: str, num_steps: int = 7) -> Trainer:
    """Trains a tiny run, saves and closes it; its folder is `folder / "run"`."""
    trainer = tiny_trainer(folder, method, *overrides)
    train_steps(trainer, num_steps)
    trainer.save()
    trainer.checkpointer.finish()
    trainer.close()
    # As in a process of its own, in which no run has set up its log.
    logging.getLogger("switchtitan").setLevel(logging.WARNING)
    return trainer


def save_run(folder: Path, method: str = "switchlora", *overrides: str, num_steps: int = 7) -> Path:
    """Trains a tiny run and saves it; returns its folder."""
    train_and_save(folder, method, *overrides, num_steps=num_steps)
    return folder / "run"


def save_qwen(folder: Path, tokenizer_folder: Path, **settings: object) -> None:
    """Saves a random Qwen2 with clearly different logits, and a tokenizer of 270 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = {
        "vocab_size": 270,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.4,
        "eos_token_id": tokenizer.eos_token_id,
        **settings,
    }
    Qwen2ForCausalLM(Qwen2Config(**config)).save_pretrained(folder)
