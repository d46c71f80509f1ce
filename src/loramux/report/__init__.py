"""Reports: pictures, one HTML page, one JSON file."""

from loramux.report.write import join_scores, write_report

__all__ = ["join_scores", "write_report"]
