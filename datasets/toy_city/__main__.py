"""`python -m datasets.toy_city`."""

import sys

from .command import main

if __name__ == "__main__":  # which processes that are spawned import too
    sys.exit(main())
