"""From Amaranth components to Verilog, Verilated programs, resource tables and proofs.

Everything that knows a tool's quirks lives here and nowhere else.
"""
