"""Typed, validated, frozen configuration sections, read from TOML and the command line."""
