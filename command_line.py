"""What the programs here do with a command line that is wrong: one line, with the flag that was probably meant.

Standard library only: `--help` and a mistake should be answered at once.
"""

import argparse
import difflib
import sys
from pathlib import Path


class OneLineErrors:
    """Put before an argparse.ArgumentParser among the base classes: wrong flags and values end in one line, code 2."""

    words: list[str] = []

    def parse_known_args(self, args=None, namespace=None):
        self.words = list(args) if args is not None else []
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        """One line instead of argparse's sixty: the usage of all flags would hide it."""
        self.exit(2, f"{self.prog}: error: {message}{self.suggestions()} (--help lists all flags)\n")

    def refuse_unknown(self, words: list[str]):
        self.error(f"unknown arguments: {' '.join(words)}")

    def suggestions(self) -> str:
        """For each flag on the command line that does not exist, the listed one that is spelled most like it."""
        flags = [word.partition("=")[0] for word in self.words if word.startswith("--")]
        unknown = [flag for flag in flags if flag not in self._option_string_actions]
        listed = [flag for flag, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
        nearest = [(flag, difflib.get_close_matches(flag, listed, 1)) for flag in unknown]
        return "".join(f"; did you mean {found[0]} instead of {flag}?" for flag, found in nearest if found)


class ArgumentParser(OneLineErrors, argparse.ArgumentParser):
    """For programs whose flags are added one by one; the description is printed as it is written."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(sys.argv[1:] if args is None else args, namespace)
        if unknown:
            self.refuse_unknown(unknown)
        return namespace


def refuse_files(**directories: Path) -> None:
    """Raises ValueError if a directory that a program will write to, named as its flag (output_dir), is a file."""
    for name, path in directories.items():
        if path.exists() and not path.is_dir():
            raise ValueError(f"--{name.replace('_', '-')} {path}: this is a file; name a directory")
