"""`python -m circuits` is the `circuits` command."""

import sys

from replacement.start import start


def main() -> int:
    """Run the command line and return its exit code."""
    return start("circuits.cli")


if __name__ == "__main__":
    sys.exit(main())
