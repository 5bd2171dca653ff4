"""`python -m replacement` is the `replacement` command, also under `torchrun -m`."""

import sys

from replacement.cli import main

if __name__ == "__main__":
    sys.exit(main())
