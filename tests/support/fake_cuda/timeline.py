"""What has ended before what, on the host and on streams, by vector clocks.

(Fidge 1988, "Timestamps in message-passing systems that preserve the partial ordering".) Every
actor counts its own operations, and knows up to which operation every other actor has come before
its next one. Whoever waits for an actor learns what that actor knows.
"""


class Actor:
    """The host or a stream; its operations run in order.

    Attributes:
        clock: actor -> its last operation that has ended before the next operation of this one.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {}

    def advance(self) -> int:
        """Counts an operation; returns its number, from 1."""
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def wait_for(self, clock: "Clock") -> None:
        """Starts the next operation after all that `clock` has seen."""
        for actor, number in clock.items():
            if number > self.clock.get(actor, 0):
                self.clock[actor] = number

    def has_seen(self, actor: "Actor", number: int) -> bool:
        """Whether this operation of `actor` has ended before the next operation of this one."""
        return self.clock.get(actor, 0) >= number


Clock = dict[Actor, int]

host = Actor("the host")
