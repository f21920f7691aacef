"""Errors that a user can mend: printed without a traceback, with exit status 2."""


class UserError(Exception):
    """What was given, what was expected and how to mend it, in one message."""


class ConfigError(UserError):
    """A key, a value or a combination of values in the configuration is wrong."""


class CorpusError(UserError):
    """A corpus or a tokenizer is missing, damaged, too small, or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint or weights file is missing, damaged, or belongs to another model, method or corpus."""


class EnvironmentMismatchError(UserError):
    """The machine, the launcher or an optional package does not allow what the configuration asks for."""
