"""How long a launch would take if every pipe did what its data sheet says: the model of `benchmarks.estimate`.

A program's instructions are counted loop by loop, times the trips that the shape gives. Of the programs that share a
processor, each round of a loop takes the longer of two times: what its busiest pipe needs for all of them, and the
serial time of one, in which matrix products, arithmetic, and copies to and from shared memory wait for one another,
every barrier costs its latency, and a load that nothing prefetches costs the memory's. Programs come in waves of as
many as fit. The whole takes no less than L2 and memory need for the bytes, and `START` more.

What it doesn't know: bank conflicts, the order of instructions, caches that miss, clocks that fall, warps that
diverge or that have different work, and bulk copies, whose size stands in a register.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from attnx.kernels.configs import Config
from attnx.kernels.machine_code import Code, Kind
from benchmarks.chips import Chip, slots

START = 2e-6  # seconds from the launch to the first instruction, and from the last to the next launch


class Use(NamedTuple):
    """registers: of a thread, accumulation registers among them; shared: bytes of a program."""

    registers: int
    shared: int


class Stage(NamedTuple):
    """A loop, or what stands outside of all. trips: rounds of it in one program; clocks: of a round, by pipe.

    serial: clocks that one round takes at least, however idle the processor is.
    """

    trips: float
    clocks: dict[str, float]
    serial: float


class Estimate(NamedTuple):
    """seconds; what limits them; by pipe the share of the time that it is busy; programs of a processor at a time.

    waste: multiply-adds of the matrix units, as a multiple of those that were asked for.
    """

    seconds: float
    limit: str
    busy: dict[str, float]
    resident: int
    waste: float


def resident(use: Use, config: Config, chip: Chip) -> int:
    """How many programs a processor holds at a time; 0 where one is too many."""
    if chip.target.backend == "hip":  # a SIMD has 512 registers a lane, and 8 waves at most
        waves = min(8, 512 // (8 * math.ceil(max(use.registers, 1) / 8)))
        by_registers = 4 * waves // config.num_warps
    else:
        by_registers = chip.registers // (256 * math.ceil(use.registers / 8)) // config.num_warps
    by_warps = chip.warps // config.num_warps
    by_shared = chip.shared // (use.shared + chip.shared_reserved) if use.shared else chip.programs
    return min(by_registers, by_warps, by_shared, chip.programs)


def stages(code: Code, config: Config, chip: Chip, trips: Sequence[float], outside: int = 0) -> list[Stage]:
    """The stages of a program.

    Args:
        trips: rounds of each loop that works, in the order of the code; of an inner loop in one round of the outer.
            Empty: every loop is gone through once. Rounds that the compiler has moved out of a kernel's only loop, to
            load ahead, are taken off.
        outside: rounds' worth of products that the kernel itself has outside of its loop, such as a last tile.

    Raises:
        ValueError: the machine code has another number of loops that work.
    """
    working = [i for i, loop in enumerate(code.loops) if loop.works]
    if not trips:
        trips = [1.0] * len(working)
    if len(working) != len(trips):
        raise ValueError(f"the machine code has {len(working)} loops that work; {len(trips)} are expected")
    own = {-1: 1.0, **dict.fromkeys(range(len(code.loops)), 1.0), **dict(zip(working, trips, strict=True))}
    if len(working) == 1:
        inside, before = (sum(i.fmas for i in code.instructions if i.loop == at) for at in (working[0], -1))
        moved = max(0.0, before / inside - outside) if inside else 0.0
        own[working[0]] = max(0.0, own[working[0]] - moved)
    result = []
    for index in own:
        body = [i for i in code.instructions if i.loop == index]
        clocks: dict[str, float] = {}
        for instruction in body:
            for pipe, busy in slots(instruction, chip).items():
                clocks[pipe] = clocks.get(pipe, 0.0) + busy * config.num_warps
        result.append(Stage(_rounds(code, index, own), clocks, _serial(code, index, clocks, config, chip)))
    return result


def _rounds(code: Code, index: int, own: dict[int, float]) -> float:
    """A loop's rounds in a whole program: its own times those of the loops around it."""
    return 1.0 if index < 0 else own[index] * _rounds(code, code.loops[index].parent, own)


def _serial(code: Code, index: int, clocks: dict[str, float], config: Config, chip: Chip) -> float:
    body = [i for i in code.instructions if i.loop == index]
    arithmetic = max((clocks.get(pipe, 0.0) for pipe in ("issue", "fp32", "integer", "exp", "vector")), default=0.0)
    operands = sum(slots(i, chip).get("shared", 0.0) for i in body if i.kind is Kind.MATRIX) * config.num_warps
    copies = clocks.get("shared", 0.0) - operands
    barriers = sum(i.opcode.startswith(("BAR.SYNC", "WARPGROUP.DEPBAR", "s_barrier", "DEPBAR")) for i in body)
    # A load into registers is waited for where nothing prefetches it; outside of loops nothing does.
    waits = any(i.kind is Kind.LOAD and not i.opcode.startswith("LDGSTS") for i in body)
    exposed = chip.latency if waits and (index < 0 or config.num_stages == 1) else 0
    return clocks.get("matrix", 0.0) + arithmetic + copies + barriers * chip.sync + exposed


def estimate(
    code: Code,
    use: Use,
    config: Config,
    chip: Chip,
    programs: int,
    trips: Sequence[float],
    moved: float,
    fmas: float,
    outside: int = 0,
) -> Estimate:
    """The time of one launch.

    Args:
        programs: how many are launched.
        trips, outside: see `stages`.
        moved: bytes to and from memory, every tensor once.
        fmas: multiply-adds that are asked for; 0 of a kernel that has none.

    Raises:
        ValueError: a program doesn't fit on a processor, or the loops are not those that `trips` tells of.
    """
    parts = stages(code, config, chip, trips, outside)
    most = resident(use, config, chip)
    if most < 1:
        raise ValueError(f"{config.num_warps} warps of {use.registers} registers, {use.shared} bytes: none fits")
    full, rest = divmod(programs, most * chip.processors)
    waves = [most] * full + ([math.ceil(rest / chip.processors)] if rest else [])
    clock = 1e9 * chip.clock
    seconds = sum(_wave(parts, at_once) for at_once in waves) / clock
    loaded = sum(i.bytes * _trips(parts, code, i.loop) for i in code.instructions if i.kind in (Kind.LOAD, Kind.STORE))
    whole = {
        "L2": loaded * chip.lanes * config.num_warps * programs / (1e12 * chip.l2),
        "memory": moved / (1e12 * chip.memory),
    }
    pipes = {pipe for part in parts for pipe in part.clocks}
    of_all = {p: sum(part.trips * part.clocks.get(p, 0.0) for part in parts) for p in pipes}
    total = max(seconds, *whole.values()) + START
    busy = {p: of_all[p] * programs / chip.processors / clock / total for p in pipes}
    busy |= {name: took / total for name, took in whole.items()}
    slowest = max(whole, key=lambda name: whole[name])
    limit = slowest if whole[slowest] > seconds else _limit(parts, waves[0])
    done = sum(i.fmas * _trips(parts, code, i.loop) for i in code.instructions) * config.num_warps * programs
    return Estimate(total, limit, busy, most, done / fmas if fmas else 1.0)


def _trips(parts: list[Stage], code: Code, loop: int) -> float:
    return parts[loop + 1].trips


def _wave(parts: list[Stage], at_once: int) -> float:
    """Clocks of one wave with that many programs on a processor."""
    return sum(part.trips * max(part.serial, at_once * max(part.clocks.values(), default=0.0)) for part in parts)


def _limit(parts: list[Stage], at_once: int) -> str:
    """What the longest stage of a wave waits for: a pipe, or where that has time to spare, the serial time."""
    longest = max(parts, key=lambda s: s.trips * max(s.serial, at_once * max(s.clocks.values(), default=0.0)))
    if not longest.clocks:
        return "serial"
    pipe = max(longest.clocks, key=lambda p: longest.clocks[p])
    return pipe if at_once * longest.clocks[pipe] >= longest.serial else f"serial, mostly {pipe}"
