"""python -m moe_jax.train: an alias of `python -m moe_jax train`, kept for old scripts."""

import sys

from moe_jax.cli.commands import run_command

if __name__ == "__main__":
    run_command("train", sys.argv[1:])
