"""Number formats, and random bits that depend on a name or a place alone."""
