"""The command ``fulgurite``: which methods there are, and what goes with what."""

import argparse
from collections.abc import Sequence

from fulgurite.commands.methods import listing


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``fulgurite``.

    Args:
        argv: arguments; None for those of the process.
    """
    _parser().parse_args(argv)
    print(listing())


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="fulgurite", description="The training methods of Fulgurite: what each is, and the page that tells more."
    )


if __name__ == "__main__":
    main()
