"""The report: one self-contained page, every number as JSON, and a timeline."""
