"""python -m scripts.push"""

import sys

from periln.scripts.arguments.push import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("scripts.push", parse, check))
