"""``python -m src.export``: make a directory that opens without this repository, see `export`."""

import sys

from src.export.export import main

if __name__ == "__main__":
    sys.exit(main())
