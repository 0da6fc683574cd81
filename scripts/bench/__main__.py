"""python -m scripts.bench"""

import sys

from periln.scripts.arguments.bench import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("scripts.bench", parse, check))
