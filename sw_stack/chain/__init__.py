"""The chain of evidence: real weights -> golden model -> RTL -> measured cycles -> system model -> report."""
