"""Matrix products as large as the workload's: `limit_process.py STEPS`; prints the FLOP of all steps."""

import sys

import torch

from tests.bench.peers.start_line import BEGIN, END, STEP, say, wait

PRODUCTS_A_STEP = 24
ROWS, INNER, COLUMNS = 2048, 512, 3072


def main(steps: int) -> None:
    """Multiply, and tell of each step."""
    left, right = torch.randn(ROWS, INNER), torch.randn(INNER, COLUMNS)
    left @ right
    wait(BEGIN)
    for _ in range(steps):
        for _ in range(PRODUCTS_A_STEP):
            left @ right
        say(STEP)
    wait(END)
    print(steps * PRODUCTS_A_STEP * 2 * ROWS * INNER * COLUMNS)


if __name__ == "__main__":
    main(int(sys.argv[1]))
