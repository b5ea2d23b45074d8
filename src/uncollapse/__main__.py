"""`python -m uncollapse` is the `uncollapse` command."""

from uncollapse.cli import main

if __name__ == "__main__":
    main()
