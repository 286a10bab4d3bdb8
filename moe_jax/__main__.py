"""python -m moe_jax COMMAND ...; see cli/commands.py."""

from moe_jax.cli.commands import main

if __name__ == "__main__":
    main()
