"""python -m scripts.demo"""

import sys

from periln.scripts.arguments.demo import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("scripts.demo", parse, check))
