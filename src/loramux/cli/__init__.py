"""The command line: one file per verb, all of them thin. Start at `main.py`."""
