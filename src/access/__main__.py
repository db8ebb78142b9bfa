"""``python -m src.access``: what the organiser of a private run does, see `organiser`."""

import sys

from src.access.organiser import main

if __name__ == "__main__":
    sys.exit(main())
