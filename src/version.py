"""The version of this software; see CHANGELOG.md."""

VERSION = "0.1.0"
# Peers of a run have this in common: a change of it says that old and new ones do not mix.
COMPATIBLE = VERSION.rpartition(".")[0]
