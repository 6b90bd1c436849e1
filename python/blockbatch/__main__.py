"""`python -m blockbatch` is the command `blockbatch`."""

from blockbatch.cli import main, ranks

if __name__ == "__main__":
    ranks.end(main())
