"""Reads and writes weights in the layouts of Hugging Face and PEFT."""
