"""The simulation core: bandwidth shared by flows, task graphs, and their execution on simpy."""
