"""The report of a run: one HTML file that needs nothing else, written from what is in the run directory."""

from hpc_rlhf.observe.report.page import leave_report, write_report

__all__ = ["leave_report", "write_report"]
