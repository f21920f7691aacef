"""Fault tests have a short form, and a long one for `./scripts/test.sh --faults`."""

import os
import random

IS_LONG = os.environ.get("SWITCHTITAN_FAULTS") == "long"


def new_draw(name):
    """A random generator that is another in every run; a failure shows how to repeat it."""
    seed = os.environ.get("SWITCHTITAN_FAULT_SEED") or str(random.randrange(10**6))
    print(f"repeat with SWITCHTITAN_FAULT_SEED={seed}")
    return random.Random(f"{seed} {name}")


def num_cases(long, short):
    """The number of cases in the long or in the short form."""
    return long if IS_LONG else short
