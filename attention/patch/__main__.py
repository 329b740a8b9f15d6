"""`python -m attention.patch SCRIPT ...`: run an unmodified program with attention in mlx-lm's models replaced."""

import sys

from attention.mlx_lm.program import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
