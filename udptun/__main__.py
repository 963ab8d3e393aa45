"""`python -m udptun` is the `udptun` command."""

from udptun.commands.cli import main

if __name__ == "__main__":
    main()
