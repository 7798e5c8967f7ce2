"""What a machine would achieve: device models on simpy, schemes, fidelities, sweeps and reproduction.

Imports simpy, numpy, pydantic and `golden.spec`; plots, tables and optimisers are imported where they are used,
so that importing `sim` stays well under half a second. Entry point: `sim.api.simulate`.
"""
