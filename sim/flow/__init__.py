"""Fidelity `flow`: every message is a flow, and flows share the links on their paths max-min fairly.

Ranks live through their stages as at fidelity `phase`: a stage starts on a rank when the stages it comes `after` and
the one before it on its stream are done there; local work first, then the legs in order. A rank that is ready for a
leg starts all its messages of that leg; receivers need not be ready (one-sided puts). It leaves the leg when its own
messages have passed and all messages for it have come.

The rule for alpha, beta and tail. A message of n bytes needs the time

    alpha * (its share of the messages) + n / beta * (tail, while other pairs share the link)

of each link on its path: its sender's port, where it leaves the node both nodes' uplinks if there are any, and its
receiver's port. The fixed cost is a part of the message, spread over it. At a rank's port the share is one message; at
an uplink, where the closed form counts a pair of nodes as one message, the messages of that pair in a leg share one
alpha by their bytes. A pair of ports (two ranks, or two nodes at an uplink) that has a link for itself pays no tail.
The speed of a flow is 1 where it is alone, then it takes max over its links of that time, rounded to nanoseconds;
speeds are max-min fair. Without alpha that is max-min fairness of bytes per second.

What follows (each a test):
* A message alone takes what `port` and `phase` say, exactly; so does an iteration in which each rank sends one message
  and receives one at most in a leg, no two messages meet on a link and none overtakes one of an earlier leg (there
  `phase` keeps the order).
* A link with m messages is busy for the sum of their times alone, which differs from the closed form alpha * m +
  bytes / beta by rounding only: at most m / 2 ns. No leg is faster than that (without tail).
* Where all messages of a link are equal and end together, a leg is the closed form, tail included, to m / 2 + 1 ns.
* Where they are not, a link pays tail only while pairs share it; the closed form charges it for all bytes.

Ends of flows are whole nanoseconds, rounded up (with 1e-6 ns and 1e-11 of the duration for floating point): a flow
keeps its share until then. All that ends or starts on one nanosecond changes the shares once.
"""

from sim.flow.ranks import flow_times

__all__ = ["flow_times"]
