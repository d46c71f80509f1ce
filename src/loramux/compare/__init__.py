"""Methods x tasks x seeds at equal trainable parameters and equal tokens, one row of results per training.

    suite = load_suite("suites/quick.yaml")
    result = run_suite(suite, Path("runs/quick"))     # go on with it: the same call

A row is appended as soon as it exists; a second run of the same suite does only what is missing.
"""

from loramux.compare.load import load_suite, parse_suite
from loramux.compare.schema import Suite, SuiteError

__all__ = ["Suite", "SuiteError", "load_suite", "parse_suite"]
