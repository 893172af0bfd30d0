"""The command line: ``stepbatch serve``, ``stepbatch generate``, ``stepbatch edit``, ``stepbatch demo``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stepbatch.cli.commands import run
from stepbatch.errors import SetupError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 some of the work failed, 2 can't be done as asked."""
    try:
        return run(sys.argv[1:] if arguments is None else list(arguments))
    except SetupError as error:
        print(f"stepbatch: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
