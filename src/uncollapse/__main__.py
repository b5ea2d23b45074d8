"""`python -m uncollapse` is the `uncollapse` command."""

from uncollapse.cli.commands import main

if __name__ == "__main__":
    main()
