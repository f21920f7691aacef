"""Entry point: `python -m switchtitan.train --config FILE [--section.key value ...]`; see `run_train.sh`."""

import sys
from collections.abc import Sequence

from switchtitan.build import build_trainer
from switchtitan.config.errors import UserError, exit_for
from switchtitan.distributed.world import start_world, stop_world
from switchtitan.job_config import parse_arguments


def main(argv: Sequence[str]) -> None:
    """Trains as the command line asks.

    Raises:
        SystemExit: with status 2, after a message, for a mistake that the user can mend.
    """
    try:
        config = parse_arguments(argv)
        world = start_world(config.parallelism)
        build_trainer(config, world).train()
    except UserError as error:
        exit_for(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        stop_world()


if __name__ == "__main__":
    main(sys.argv[1:])
