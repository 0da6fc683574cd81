"""python -m scripts.gpu_check"""

import sys

from periln.scripts.arguments.gpu_check import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("scripts.gpu_check", parse, check))
