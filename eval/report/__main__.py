"""python -m eval.report"""

import sys

from runkit.errors import run_command

from .command import main, parse

if __name__ == "__main__":
    arguments = parse()
    sys.exit(run_command(main, arguments))
