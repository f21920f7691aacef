"""Continue prompts with a trained model: decoding, sampling, and text from tokens."""
