"""`python -m replacement` is the `replacement` command, also under `torchrun -m`."""

import sys

from replacement.start import start


def main() -> int:
    """Run the command line and return its exit code."""
    return start("replacement.cli")


if __name__ == "__main__":
    sys.exit(main())
