"""Low-rank pretraining of LLaMA-like models: SwitchLoRA on FSDP2 and torch.compile."""

__version__ = "0.4.0"
