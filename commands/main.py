"""The command ``fulgurite``: which methods there are, and what goes with what."""

import argparse
import json
import os
from collections.abc import Sequence

from fulgurite.commands.compatibility import measure, render
from fulgurite.commands.methods import listing
from fulgurite.plugins.output import print_out


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``fulgurite``.

    Args:
        argv: arguments; None for those of the process.
    """
    arguments = _parser().parse_args(argv)
    if arguments.command != "compat":
        print_out(listing())
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there: with more, forked processes hang
    found = measure()
    print_out(json.dumps(found, indent=1) if arguments.json else render(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fulgurite", description="The training methods of Fulgurite: what each does, and the page that tells more."
    )
    compat = parser.add_subparsers(dest="command").add_parser(
        "compat", help="try each strategy with what else there is, in short fits that take some minutes"
    )
    compat.add_argument("--json", action="store_true", help="print JSON instead of a table in Markdown")
    return parser


if __name__ == "__main__":
    main()
