"""`python -m attnx`: the command line."""

from attnx.cli.main import main

if __name__ == "__main__":
    main()
