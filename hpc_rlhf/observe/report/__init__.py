"""The report of a run: one self-contained HTML file, written from the run directory."""

from hpc_rlhf.observe.report.page import leave_report, write_report

__all__ = ["leave_report", "write_report"]
