"""python -m scripts.sweep"""

import sys

from periln.scripts.arguments.sweep import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("scripts.sweep", parse, check))
