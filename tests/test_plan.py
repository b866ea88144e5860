"""The planner: costs from what was measured, an engine of nothing but costs, and machines for so many."""

import json
from dataclasses import replace

import numpy as np
import pytest

from antiphon import cli
from antiphon.bench.costs import Cost, Turns, costs_of, fitted
from antiphon.bench.load import Load
from antiphon.engine.call import Work
from antiphon.errors import InputError
from antiphon.scale.plan import Device, Target, capacity, devices

SURE = {  # seconds that never vary
    "wish": Cost("thinking", 0.001, 0, 0, 0),
    "aut": Cost("thinking", 0.010, 0, 0, 0),
    "thinker": Cost("thinking", 0.002, 0, 0.0001, 0),
    "draw": Cost("thinking", 0.001, 0, 0, 0),
    "talker": Cost("speaking", 0.005, 0, 0, 0),
    "frame": Cost("speaking", 0.004, 0.010, 0, 0),
    "sound": Cost("sounding", 0.003, 0.002, 0, 0),
}
TURNS = Turns(voiced=1.0, positions=30, rate=13, tokens=(4,), frames=(25,), seconds=0.08)


def test_costs_are_found_again_in_what_was_measured():
    random = np.random.default_rng(0)
    cost = Cost("thinking", 0.003, 0.0005, 0.0001, 0.2)
    pairs = [(calls, positions) for calls in (1, 2, 4, 8) for positions in (0, 20, 60) for _ in range(60)]
    work = [
        Work("thinking", "thinker", 0.0, cost.seconds(calls, positions, random), ("a",) * calls, positions)
        for calls, positions in pairs
    ]
    found = costs_of(work)["thinker"]
    assert found.lane == "thinking"
    for name, near in (("base", 0.1), ("each", 0.15), ("long", 0.1), ("spread", 0.1)):
        assert getattr(found, name) == pytest.approx(getattr(cost, name), rel=near)
    total = sum(one.stop for one in work)
    assert sum(found.base + found.each * c + found.long * p for c, p in pairs) == pytest.approx(total, rel=0.03)


def test_what_never_varied_is_in_the_base_and_nothing_costs_less_than_nothing():
    assert fitted("speaking", [(0.01, 1, 0), (0.01, 1, 0)]) == Cost("speaking", 0.01, 0.0, 0.0, 0.0)
    falling = fitted("speaking", [(0.02, 1, 0), (0.01, 8, 0)])
    assert falling.each == 0
    assert falling.base > 0


def test_one_alone_waits_for_every_step_on_the_way_to_its_first_packet():
    figures = Device(SURE, TURNS, Load(1, turns=2)).run()
    steps = 1 + 10 + (2 + 30 * 0.1) + 5 + 14 + 5  # wish, AuT, Thinker, Talker along, frame, sound; the draw is beside
    assert figures["code_ms"]["p50"] == pytest.approx(steps, abs=0.2)
    assert figures["packets"] == 50
    assert figures["late"]["0 ms"] == 0
    assert figures["in_time"] == 1
    asked, heard = 2 * 1.0, 2 * 25 * 0.08  # and nothing else takes its time
    assert 50 * 0.014 / (asked + heard + 0.1) < figures["lanes"]["speaking"] < 50 * 0.014 / (asked + heard) + 0.05


def test_answers_are_late_when_a_frame_of_all_takes_longer_than_a_frame_lasts():
    def late(at_once: int) -> float:
        turns = replace(TURNS, frames=(100,))
        figures = Device(SURE, turns, Load(at_once, turns=3, max_frames=100)).run()
        return figures["late"]["80 ms"] / figures["packets"]

    assert late(6) == 0  # 4 + 6 · 10 = 64 ms, and the sound is made beside the next
    assert late(16) > 0.5


def test_lanes_wait_for_threads():
    """A frame of 64 ms and its sound of 30 are 94: beside each other in time, and not in one thread."""
    costs = {"frame": Cost("speaking", 0.064, 0, 0, 0), "sound": Cost("sounding", 0.030, 0, 0, 0)}

    def late(threads: int) -> float:
        turns = replace(TURNS, frames=(100,), threads=threads)
        return Device(costs, turns, Load(2, turns=1, max_frames=100)).run()["late"]["80 ms"]

    assert late(2) == 0
    assert late(1) > 50


def test_capacity_is_the_most_that_is_kept_and_says_what_gives_out():
    turns = replace(TURNS, frames=(100,))
    tried: list[int] = []
    held = capacity(SURE, turns, Target(first_ms=400), 0.0, tried.append)
    assert 7 <= held.conversations <= 12
    assert "speaking" in held.saturates
    assert held.conversations in tried
    assert held.conversations + 1 in tried
    fewer = capacity(SURE, turns, Target(first_ms=60), 0.0, lambda count: None)
    assert fewer.conversations < held.conversations
    with pytest.raises(InputError, match="give a higher --first-ms"):
        capacity(SURE, turns, Target(first_ms=10), 0.0, lambda count: None)


@pytest.mark.parametrize(("offered", "refused", "places"), [(10, 0.01, 18), (100, 0.01, 117), (1, 0.001, 6)])
def test_places_are_those_of_erlangs_table(offered, refused, places):
    assert devices(offered, 1, refused) == places


def test_larger_fleets_use_their_places_better():
    used = [n / (8 * devices(n, 8, 0.001)) for n in (10, 100, 1000, 100_000)]
    assert used == sorted(used)
    assert used[-1] > 0.98


def test_the_command_tells_machines_and_compares(tmp_path, capsys, monkeypatch):
    bench = {
        "machine": "two cores",
        "costs": {name: vars(cost) for name, cost in SURE.items()},
        "turns": vars(TURNS) | {"tokens": [4], "frames": [25]},
        "loads": [Device(SURE, TURNS, Load(n, turns=2)).run() | {"busy": 0.5} for n in (1, 4)],
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench))

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["antiphon", "plan", str(path), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out

    told = run("-n", "1000", "--price", "0.6")
    assert "two cores" in told
    plan = json.loads(run("-n", "1000", "--json", "--price", "0.6"))
    (one,) = plan["plans"]
    assert one["machines"] == devices(1000, plan["each"], 0.001)
    assert one["price_a_minute"] == pytest.approx(0.6 / 60 * one["machines"] / 1000)
    rows = json.loads(run("--check", str(path), "--json"))["checked"]
    assert [row["conversations"] for row in rows] == [1, 4]
    for row in rows:
        predicted, measured = row["first packet p50"]
        assert predicted == pytest.approx(measured, rel=0.05)
    path.write_text("{}")
    monkeypatch.setattr("sys.argv", ["antiphon", "plan", str(path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "antiphon bench" in capsys.readouterr().err
