"""What a command prints."""

import os
import sys


def print_out(text: str) -> None:
    """Prints a command's output; where nobody reads on, as after ``| head``, the process ends quietly with status 1."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit would complain
        sys.exit(1)
