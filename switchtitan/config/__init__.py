"""Typed, validated, frozen configuration sections from TOML files and the command line."""
