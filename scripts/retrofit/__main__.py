"""python -m scripts.retrofit"""

import sys

from periln.scripts.arguments.retrofit import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("scripts.retrofit", parse, check))
