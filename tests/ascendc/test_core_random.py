"""The ordering analysis against an independent model: random programs, judged by reachability.

The model builds the graph of what must happen before what, from the rules alone: an instruction
starts after it is issued and after its pipe's earlier instructions have started, it finishes some
time after its start, a flag is set once its pipe's earlier instructions have finished. Two touches
of one place, one of them a write, are a fault unless the first finishes before the other starts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from spcomp.backends.ascendc.emulate import Buffer, EmulatedKernel, EmulatorFault, Launch
from tests.ascendc.cases import PROBES
from tests.ascendc.harness import kernel

READ, WRITE, SET, WAIT, BARRIER, CROSS_SET, CROSS_WAIT = range(7)
S, V, MTE2, MTE3, ALL = 0, 1, 3, 4, 7  # as in pipe_t
PIPES = (S, V, MTE2, MTE3)
PLACES_UB, PLACES, LENGTH = 3, 8, 28
Step = tuple[int, int, int, int]  # what, pipe, other pipe or place, id

INTERPRETER = (
    PROBES
    + """
template <pipe_t pipe>
void Touch(int what, const LocalTensor<float>& t, const GlobalTensor<float>& g, int place,
           int count) {
  if (place < 3 && what == 0) Read<pipe>(t, place * 8, 8);
  if (place < 3 && what == 1) Write<pipe>(t, place * 8, 8);
  if (place >= 3 && what == 0) Read<pipe>(g, place - 3, count);
  if (place >= 3 && what == 1) Write<pipe>(g, place - 3, count);
}
template <pipe_t from, pipe_t to>
void Flag(int what, int id) {
  constexpr auto event = HardEvent(emulator::event_number(from, to));
  if (what == 2) SetFlag<event>(id); else WaitFlag<event>(id);
}
template <pipe_t from>
void FlagTo(int what, int to, int id) {
  if constexpr (from != PIPE_S) { if (to == PIPE_S) Flag<from, PIPE_S>(what, id); }
  if constexpr (from != PIPE_V) { if (to == PIPE_V) Flag<from, PIPE_V>(what, id); }
  if constexpr (from != PIPE_MTE2) { if (to == PIPE_MTE2) Flag<from, PIPE_MTE2>(what, id); }
  if constexpr (from != PIPE_MTE3) { if (to == PIPE_MTE3) Flag<from, PIPE_MTE3>(what, id); }
}
template <pipe_t pipe>
void Do(int what, int other, int id, const LocalTensor<float>& t, const GlobalTensor<float>& g) {
  if (what <= 1) Touch<pipe>(what, t, g, other, id);
  if (what == 2 || what == 3) FlagTo<pipe>(what, other, id);
  if constexpr (pipe != PIPE_S) { if (what == 5) CrossCoreSetFlag<1, pipe>(id); }
  if (what == 6) CrossCoreWaitFlag(id);
  if constexpr (pipe != PIPE_S) { if (what == 4) PipeBarrier<pipe>(); }
}
"""
)
BODY = """
  if ASCEND_IS_AIC { return; }
  TPipe pipe; UbBuf buf; pipe.InitBuffer(buf, 256);
  auto t = buf.Get<float>(); auto g = Gm<float>(y);
  const int32_t* step = (const int32_t*)x + GetSubBlockIdx() * length * 4;
  for (int i = 0; i < length; ++i, step += 4) {
    if (step[0] == 4 && step[1] == PIPE_ALL) { PipeBarrier<PIPE_ALL>(); continue; }
    if (step[1] == PIPE_S) Do<PIPE_S>(step[0], step[2], step[3], t, g);
    if (step[1] == PIPE_V) Do<PIPE_V>(step[0], step[2], step[3], t, g);
    if (step[1] == PIPE_MTE2) Do<PIPE_MTE2>(step[0], step[2], step[3], t, g);
    if (step[1] == PIPE_MTE3) Do<PIPE_MTE3>(step[0], step[2], step[3], t, g);
  }
"""


@dataclass
class Graph:
    """Nodes are numbers; an edge goes from what happens first."""

    after: list[set[int]] = field(default_factory=list)

    def node(self, *before: int) -> int:
        self.after.append(set())
        for first in before:
            self.after[first].add(len(self.after) - 1)
        return len(self.after) - 1

    def reaches(self, first: int, second: int) -> bool:
        seen, left = {first}, [first]
        while left:
            for node in self.after[left.pop()] - seen:
                seen.add(node)
                left.append(node)
        return second in seen


@dataclass(frozen=True)
class Touch:
    """A read or write of a place, with its two nodes in the graph."""

    core: int
    pipe: int
    place: int  # below PLACES_UB a cell of the core's UB, then an element of GM
    count: int
    what: int
    start: int
    finish: int


@dataclass
class Core:
    """How far one core's program is in the graph: the scalar unit, and each pipe's last events."""

    graph: Graph
    scalar: int = 0
    started: dict[int, int] = field(default_factory=dict)  # what the pipe's next start follows
    finished: dict[int, list[int]] = field(default_factory=dict)
    flags: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scalar = self.graph.node()
        self.started = {pipe: self.scalar for pipe in PIPES}
        self.finished = {pipe: [] for pipe in PIPES}

    def touch(self, pipe: int) -> tuple[int, int]:
        start = self.graph.node(self.scalar, self.started[pipe])
        finish = self.graph.node(start)
        self.started[pipe] = start
        self.finished[pipe].append(finish)
        return start, finish

    def event(self, pipe: int) -> int:
        """Give the moment when everything issued to the pipe so far has finished."""
        return self.graph.node(self.scalar, self.started[pipe], *self.finished[pipe])

    def hold(self, pipe: int, event: int) -> None:
        """Let nothing that follows in the pipe start before the event."""
        self.started[pipe] = self.graph.node(self.scalar, self.started[pipe], event)
        if pipe == S:
            self.scalar = self.graph.node(self.scalar, event)

    def hold_all(self, events: list[int]) -> None:
        self.scalar = self.graph.node(self.scalar, *events)


def is_faulty(programs: list[list[Step]], order: list[int]) -> bool:
    """Judge the programs of some cores, whose steps happen in the given order of cores."""
    graph = Graph()
    cores = [Core(graph) for _ in programs]
    touches: list[Touch] = []
    meetings: list[list[int]] = [[] for _ in programs]  # each core's cross-core sets, in turn
    met = [0] * len(programs)
    at = [0] * len(programs)
    for number in order:
        what, pipe, other, flag = programs[number][at[number]]
        at[number] += 1
        core = cores[number]
        if what in (READ, WRITE):
            start, finish = core.touch(pipe)
            touches.append(Touch(number, pipe, other, flag, what, start, finish))
        elif what == SET:
            core.flags[pipe, other, flag] = core.event(pipe)
        elif what == WAIT:
            core.hold(other, core.flags.pop((pipe, other, flag)))
        elif what == BARRIER and pipe == ALL:
            core.hold_all([core.event(p) for p in PIPES])
        elif what == BARRIER:
            core.hold(pipe, core.event(pipe))
        elif what == CROSS_SET:
            meetings[number].append(core.event(pipe))
        elif what == CROSS_WAIT:
            core.hold_all([sets[met[number]] for sets in meetings])
            met[number] += 1
    return any(
        conflict(graph, one, two) for n, one in enumerate(touches) for two in touches[n + 1 :]
    )


def conflict(graph: Graph, one: Touch, two: Touch) -> bool:
    apart = one.place >= two.place + two.count or two.place >= one.place + one.count
    apart |= one.core != two.core and min(one.place, two.place) < PLACES_UB
    if apart or (one.what == READ and two.what == READ):
        return False
    if one.core != two.core and graph.reaches(two.finish, one.start):
        return False
    if one.core == two.core and one.pipe == two.pipe and (one.pipe == S or one.what == READ):
        return False
    return not graph.reaches(one.finish, two.start)


def random_program(rng: random.Random, steps: int) -> list[Step]:
    """Draw a program of one core whose flags are set once and waited for."""
    program: list[Step] = []
    open_flags: set[tuple[int, int, int]] = set()
    while len(program) < steps:
        draw = rng.random()
        pipe = rng.choice(PIPES)
        other = rng.choice([p for p in PIPES if p != pipe])
        if draw < 0.3:
            place = rng.randrange(PLACES_UB if pipe == S else PLACES)  # no data cache here
            count = rng.randrange(1, 5) if place >= PLACES_UB else 1
            program.append((rng.choice((READ, READ, WRITE)), pipe, place, count))
        elif draw < 0.6 and (pipe, other, 0) not in open_flags:
            open_flags.add((pipe, other, 0))
            program.append((SET, pipe, other, 0))
        elif draw < 0.9 and open_flags:
            pipe, other, flag = rng.choice(sorted(open_flags))
            open_flags.remove((pipe, other, flag))
            program.append((WAIT, pipe, other, flag))
        elif draw >= 0.9:
            program.append((BARRIER, rng.choice((V, V, MTE2, MTE3, ALL)), 0, 0))
    return program + [(WAIT, *flag) for flag in sorted(open_flags)]


def random_programs(rng: random.Random) -> tuple[list[list[Step]], list[int]]:
    """Draw two cores that meet now and then: both set a flag of mode 1, both wait for it."""
    programs: list[list[Step]] = [[], []]
    order: list[int] = []
    for _ in range(3):
        for number in (0, 1):
            part = random_program(rng, rng.randrange(1, 5))
            programs[number] += part
            order += [number] * len(part)
        if rng.random() < 0.8:
            for what in (CROSS_SET, CROSS_WAIT):
                for number in (0, 1):
                    programs[number].append((what, rng.choice((V, MTE2, MTE3)), 0, 3))
                    order.append(number)
    return programs, order


@pytest.fixture(scope="module")
def interpreter() -> EmulatedKernel:
    return kernel(BODY, ("x", "y"), (("int64_t", "length"),), INTERPRETER)


def judged_faulty(
    interpreter: EmulatedKernel, programs: list[list[Step]], descending: bool = False
) -> bool:
    length = max(len(program) for program in programs)
    steps = np.full((2, length, 4), -1, np.int32)
    for number, program in enumerate(programs):
        steps[number, : len(program)] = np.array(program, np.int32).reshape(-1, 4)
    launch = Launch(kind="mix", ratio=2, descending=descending)
    try:
        interpreter.run(
            [Buffer("x", steps, True), Buffer("y", np.zeros(16, np.float32)), length], launch
        )
    except EmulatorFault as fault:
        assert "may not have finished" in str(fault), str(fault)
        return True
    return False


def test_one_core_agrees_with_the_model(interpreter: EmulatedKernel) -> None:
    rng = random.Random(1)
    verdicts = []
    for _ in range(1500):
        program = random_program(rng, rng.randrange(2, LENGTH))
        wanted = is_faulty([program, []], [0] * len(program))
        assert judged_faulty(interpreter, [program, []]) == wanted, program
        verdicts.append(wanted)
    assert 0.2 < np.mean(verdicts) < 0.8


def test_two_cores_agree_with_the_model(interpreter: EmulatedKernel) -> None:
    rng = random.Random(2)
    verdicts = []
    for number in range(1500):
        programs, order = random_programs(rng)
        wanted = is_faulty(programs, order)
        assert judged_faulty(interpreter, programs, bool(number % 2)) == wanted, programs
        verdicts.append(wanted)
    assert 0.2 < np.mean(verdicts) < 0.8
