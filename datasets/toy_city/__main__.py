"""`python -m datasets.toy_city`."""

import sys

from . import main

if __name__ == "__main__":  # spawned processes import this too
    sys.exit(main())
