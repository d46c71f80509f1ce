"""`python -m loramux` is the command line."""

from loramux.cli.main import run

if __name__ == "__main__":
    run()
