"""The asynchronous part of a streaming multiprocessor: groups of warps, barriers, loads and products in flight.

Each group of warps knows which loads and products are complete. Waiting for a barrier adds what the groups that arrived
at it knew then. An access to shared memory must know about the accesses before it; the order in which the groups happen
to run makes no difference to this check.
"""

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# {place or (group, "products" | "registers"): number of its loads or reads that are known to be complete}
Knowledge = dict[Any, int]


class HazardError(AssertionError):
    """An access that no barrier orders, a deadlock, or a misuse of a barrier."""


class Place:
    """A box of shared memory, of which one load or several readers have access at a time.

    Attributes:
        written: number of loads and stores so far.
        readers: {(group, "products" | "registers"): number of its last read} since the last write.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.written = 0
        self.readers: Knowledge = {}


class Barrier:
    """An mbarrier: a phase is complete after `count` arrivals, when all expected bytes have arrived."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = self.pending = self.nbytes = self.phase = 0
        self.arriving: Knowledge = {}  # what the arrivals of this phase knew
        self.released: Knowledge = {}  # the same of the last complete phase

    def advance(self) -> None:
        """Complete the phase if nothing is missing."""
        if self.pending == 0 and self.nbytes == 0:
            self.phase += 1
            self.pending, self.released, self.arriving = self.count, self.arriving, {}


class Product:
    """A product of matrices in flight. Its value exists after the wait."""

    def __init__(self, compute: Callable[[], np.ndarray]) -> None:
        self.compute = compute
        self.value: np.ndarray | None = None

    def finish(self) -> np.ndarray:
        """The result."""
        if self.value is None:
            self.value = self.compute()
        return self.value

    def _use(self, other: Any) -> Any:
        raise HazardError("the result of a product is used before the wait")

    __array_ufunc__ = None
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _use


class Machine:
    """One program: its groups of warps take turns, and switch wherever they synchronise.

    Args:
        pid, programs: index and number of programs.
        seed: decides the order in which the groups run.
        early_loads: loads land at once; else only when no group can go on without them.
        early_products: products read their operands at once; else at the wait.
    """

    def __init__(self, pid: int, programs: int, seed: int, early_loads: bool, early_products: bool) -> None:
        self.pid, self.programs = pid, programs
        self.early_loads, self.early_products = early_loads, early_products
        self.random = random.Random(f"{seed} {pid}")
        self.known: list[Knowledge] = [{}]  # of each group; before the groups start there is one
        self.in_flight: list[list[Product]] = [[]]
        self.finished: list[int] = [0]  # products that each group has waited for
        self.loads: list[Callable[[], None]] = []
        self.blocked: dict[int, Callable[[], bool]] = {}
        self.running: set[int] = set()
        self.turn = threading.Condition()
        self.current = 0
        self.error: BaseException | None = None
        self.places: list[Place] = []

    @property
    def group(self) -> int:
        """Index of the running group."""
        return self.current

    def place(self, name: str) -> Place:
        """A new box of shared memory."""
        self.places.append(Place(name))
        return self.places[-1]

    # Groups

    def specialize(self, groups: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Run functions as groups of warps until all have returned."""
        before, count = self.known[0], len(groups)
        self.known = [dict(before) for _ in groups]
        self.in_flight = [[] for _ in groups]
        self.finished = [0] * count
        self.running = set(range(count))
        threads = [
            threading.Thread(target=self._run, args=(group, function, args), daemon=True)
            for group, (function, args) in enumerate(groups)
        ]
        self.current = self.random.randrange(count)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error
        for group, products in enumerate(self.in_flight):
            if products:
                raise HazardError(f"group {group} ends with products in flight")
        for place in self.places:
            if not any(known.get(place, 0) >= place.written for known in self.known):
                raise HazardError(f"{place.name}: the program ends while a load may be in flight")
        self.known = [before]

    def _run(self, group: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.current == group or self.error is not None)
        try:
            if self.error is None:
                with np.errstate(all="ignore"):  # as on a GPU; it holds for one thread
                    function(*args)
        # The error of a group is raised where the program was started.
        except BaseException as error:
            self.error = self.error or error
        self.running.discard(group)
        self._switch(group)

    def _switch(self, group: int, until: Callable[[], bool] | None = None) -> None:
        """Let another group run, and return when it is this one's turn again and `until` is true."""
        with self.turn:
            if until is not None:
                self.blocked[group] = until
            try:
                self.current = self._next()
            except HazardError as error:
                self.error = self.error or error
            self.turn.notify_all()
            if group in self.running:
                self.turn.wait_for(lambda: self.current == group or self.error is not None)
                self.blocked.pop(group, None)
                if self.error is not None:
                    raise HazardError("another group failed") from self.error

    def _next(self) -> int:
        """The group to run: any that is not blocked. If all are, loads land."""
        if not self.running:
            return -1
        while True:
            able = [g for g in sorted(self.running) if g not in self.blocked or self.blocked[g]()]
            if able:
                return self.random.choice(able)
            if not self.loads:
                raise HazardError("deadlock: every group of warps waits for a barrier")
            self.loads.pop(0)()

    # Barriers

    def arrive(self, barrier: Barrier, count: int = 1, nbytes: int = 0) -> None:
        """Arrive at a barrier, with what this group knows; `nbytes` are expected in addition."""
        if barrier.pending < count:
            raise HazardError(f"{barrier.name}: more arrivals than the barrier takes in a phase")
        barrier.pending -= count
        barrier.nbytes += nbytes
        _learn(barrier.arriving, self.known[self.group])
        barrier.advance()
        self._switch(self.group)

    def wait(self, barrier: Barrier, parity: int) -> None:
        """Wait until the phase of this parity is complete."""
        group = self.group
        self._switch(group, lambda: barrier.phase & 1 != parity)
        _learn(self.known[group], barrier.released)

    # Shared memory

    def load(self, place: Place, write: Callable[[], None], barrier: Barrier, nbytes: int) -> None:
        """Start a load into a place, which tells the barrier when it has landed."""
        self.check_write(place, "is loaded")
        written = place.written = place.written + 1
        place.readers = {}

        def land() -> None:
            write()
            barrier.nbytes -= nbytes
            _learn(barrier.arriving, {place: written})
            barrier.advance()

        if self.early_loads:
            land()
        else:
            self.loads.append(land)

    def store(self, place: Place) -> None:
        """Note a store into a place, which this group knows at once."""
        self.check_write(place, "is stored to")
        place.written += 1
        place.readers = {}
        self.known[self.group][place] = place.written

    def check_write(self, place: Place, what: str) -> None:
        """Raise HazardError unless this group knows that everything before is complete."""
        known = self.known[self.group]
        if known.get(place, 0) < place.written:
            raise HazardError(f"{place.name} {what} while it may still be loaded")
        for group, read in place.readers.items():
            if known.get(group, 0) < read:
                raise HazardError(f"{place.name} {what} while group {group[0]} may still read it")

    def check_read(self, place: Place) -> None:
        """Raise HazardError unless this group knows that the place is loaded."""
        if self.known[self.group].get(place, 0) < place.written or not place.written:
            raise HazardError(f"{place.name} is read before it is known to be loaded")

    def read(self, place: Place) -> None:
        """Note a load of registers from a place, which is complete at once."""
        self.check_read(place)
        reader = (self.group, "registers")
        known = self.known[self.group]
        known[reader] = place.readers[reader] = known.get(reader, 0) + 1

    # Products

    def multiply(self, places: Sequence[Place], compute: Callable[[], np.ndarray]) -> Product:
        """Start a product that reads these places."""
        group, product = self.group, Product(compute)
        for place in places:
            self.check_read(place)
            place.readers[group, "products"] = self.finished[group] + len(self.in_flight[group]) + 1
        if self.early_products:
            product.finish()
        self.in_flight[group].append(product)
        return product

    def wait_products(self, in_flight: int) -> None:
        """Wait until at most this number of products is in flight."""
        group, products = self.group, self.in_flight[self.group]
        while len(products) > in_flight:
            products.pop(0).finish()
            self.finished[group] += 1
        self.known[group][group, "products"] = self.finished[group]


def _learn(known: Knowledge, more: Knowledge) -> None:
    for key, number in more.items():
        known[key] = max(known.get(key, 0), number)
