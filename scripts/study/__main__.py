"""python -m scripts.study"""

import sys

from periln.scripts.arguments.study import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("scripts.study", parse, check))
