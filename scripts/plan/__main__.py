"""python -m scripts.plan"""

import sys

from periln.scripts.arguments.plan import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("scripts.plan", parse, check))
