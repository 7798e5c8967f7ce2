"""The core against hand-computed schedules, and its bounds against random graphs."""

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.core.fabric import Fabric
from sim.core.graph import Graph, analytic, demand_s, execute


def finish_times(rates, flows):
    """End time of each (start_s, path, bytes, cap) flow."""
    env = simpy.Environment()
    fabric = Fabric(env, rates)
    ends = {}

    def one(number, start, path, size, cap):
        yield env.timeout(start)
        yield fabric.transfer(path, size, cap)
        ends[number] = env.now

    for number, flow in enumerate(flows):
        env.process(one(number, *flow))
    env.run()
    return [ends[i] for i in range(len(flows))]


INF = float("inf")


def test_two_flows_share_and_the_survivor_speeds_up():
    # 100 B/s: both run at 50 until the short one ends at t=2; the long one has 100 left and ends at t=3.
    assert finish_times({"a": 100.0}, [(0, ("a",), 100.0, INF), (0, ("a",), 200.0, INF)]) == pytest.approx(
        [2, 3]
    )


def test_max_min_fairness_gives_the_capped_flow_its_cap_and_others_the_rest():
    ends = finish_times({"a": 90.0}, [(0, ("a",), 10.0, 10.0), (0, ("a",), 80.0, INF)])
    assert ends == pytest.approx([1, 1])


def test_a_shared_uplink_binds_before_the_drives_behind_it():
    rates = {"up": 100.0, "d0": 80.0, "d1": 80.0}
    ends = finish_times(rates, [(0, ("d0", "up"), 100.0, INF), (0, ("d1", "up"), 100.0, INF)])
    assert ends == pytest.approx([2, 2])


def test_late_arrival_slows_the_first():
    ends = finish_times({"a": 100.0}, [(0, ("a",), 100.0, INF), (0.5, ("a",), 100.0, INF)])
    assert ends == pytest.approx([1.5, 2.0])


def test_a_server_serves_in_order_and_records_the_holder_as_cause():
    graph = Graph()
    first = graph.work("x", "compute", "s", 2.0)
    second = graph.work("y", "compute", "s", 1.0)
    run = execute(graph, {})
    assert (run.start_s[second], run.end_s[second], run.cause[second]) == (2.0, 3.0, first)
    assert [s[2] for s in run.critical()] == [first, second]


def test_critical_path_covers_the_makespan_without_gaps():
    graph = Graph()
    a = graph.work("a", "compute", "gpu", 1.0)
    load = graph.move("load", "kv access", ("p",), 300.0)
    b = graph.work("b", "compute", "gpu", 1.0, [a, load])
    run = execute(graph, {"p": 100.0})
    segments = run.critical()
    assert [s[2] for s in segments] == [load, b]
    assert segments[0][0] == 0
    assert all(x[1] == y[0] for x, y in zip(segments, segments[1:]))
    assert segments[-1][1] == run.makespan_s == 4.0


TASK = st.tuples(
    st.booleans(), st.floats(0.01, 10), st.integers(0, 2), st.lists(st.integers(0, 30), max_size=3)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(TASK, min_size=1, max_size=14))
def test_no_schedule_beats_the_analytic_bounds(tasks):
    graph = Graph()
    rates = {"p0": 1.0, "p1": 2.0, "p2": 3.0}
    for number, (server, amount, where, after) in enumerate(tasks):
        deps = sorted({d for d in after if d < number})
        if server:
            graph.work("w", "compute", f"s{where}", amount, deps)
        else:
            graph.move("m", "transfer", (f"p{where}", f"p{(where + 1) % 3}"), amount, deps)
    run = execute(graph, rates)
    assert run.makespan_s >= analytic(graph, rates).makespan_s * (1 - 1e-9)
    assert run.makespan_s >= max(demand_s(graph, rates).values()) * (1 - 1e-9)
    for task, start, end in zip(graph.tasks, run.start_s, run.end_s):
        assert end - start >= task.alone_s(rates) * (1 - 1e-9)
        assert all(run.end_s[d] <= start + 1e-12 for d in task.after)
    covered = sum(end - start for start, end, _ in run.critical())
    assert covered == pytest.approx(run.makespan_s)
