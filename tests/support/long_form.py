"""Fault tests have a short form, and a long one for `./scripts/test.sh --faults`."""

import os

IS_LONG = os.environ.get("SWITCHTITAN_FAULTS") == "long"


def num_cases(long, short):
    """The number of cases in the long or in the short form."""
    return long if IS_LONG else short
