"""The `lm_eval` command as it is, with FP16 products on a CPU as tensor cores compute them."""

import torch
from lm_eval.__main__ import cli_evaluate

from periln.runkit.fp16 import HalfMatmul

if __name__ == "__main__":
    torch.set_num_threads(1)
    with HalfMatmul():
        cli_evaluate()
