"""`python -m blockbatch` is the command `blockbatch`."""

import sys

from blockbatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
