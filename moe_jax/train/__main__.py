"""python -m moe_jax.train: the older form of `python -m moe_jax train`, kept for scripts."""

import sys

from moe_jax.cli.commands import run_command

if __name__ == "__main__":
    run_command("train", sys.argv[1:])
