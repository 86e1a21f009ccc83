"""The definition in `sim.ports`, evaluated leg by leg with no event at all."""

import numpy as np

from placer.core.cluster import ClusterSpec
from placer.core.cost import leg_times


def leave_by_definition(
    cluster: ClusterSpec, copy_bytes: int, copies_RR: np.ndarray, ready_R: np.ndarray, free: dict[tuple[str, int], int]
) -> np.ndarray:
    """When each rank leaves a leg for which it is ready at ready_R; `free`: when each port is done, updated."""
    ranks = range(cluster.num_ranks)
    node = cluster.node_R.tolist()

    def times(of_RR: np.ndarray) -> object:
        return leg_times(cluster, of_RR[None], copy_bytes)

    def port_done(port: tuple[str, int], through_RR: np.ndarray, duration: object) -> int:
        """`duration(copies)` of the tails of `through_RR` in order of readiness, and after the leg before."""
        if not through_RR.any():
            return free.get(port, 0)
        done = free.get(port, 0) + duration(through_RR)
        for sender in ranks:
            if through_RR[sender].any():
                later_R = ready_R >= ready_R[sender]
                done = max(done, int(ready_R[sender]) + duration(through_RR * later_R[:, None]))
        free[port] = done
        return done

    away_RR = np.array([[node[a] != node[b] for b in ranks] for a in ranks])
    receiving: dict[int, int] = {}
    for rank in ranks:
        to_me = np.zeros_like(copies_RR)
        to_me[:, rank] = copies_RR[:, rank]
        for name, mask in (("intra", ~away_RR), ("inter", away_RR)):
            through = to_me * mask
            if through.any():
                done = port_done((name, rank), through, lambda c, r=rank: int(times(c).in_WR[0, r]))
                receiving[rank] = max(receiving.get(rank, 0), done)
    uplink_out, uplink_in = {}, {}
    if cluster.uplink is not None and cluster.nodes > 1:
        for n in range(cluster.nodes):
            inside = cluster.node_R == n
            out = copies_RR * away_RR * inside[:, None]
            into = copies_RR * away_RR * inside[None, :]
            uplink_out[n] = port_done(("out", n), out, lambda c, n=n: int(times(c).uplink_out_WN[0, n]))
            uplink_in[n] = port_done(("in", n), into, lambda c, n=n: int(times(c).uplink_in_WN[0, n]))
    sent_R = ready_R + times(copies_RR).out_WR[0]
    leave = []
    for rank in ranks:
        ends = [int(sent_R[rank]), receiving.get(rank, 0)]
        senders = [s for s in ranks if copies_RR[s, rank] > 0]
        ends += [int(sent_R[s]) for s in senders]
        if uplink_out:
            ends += [uplink_out[node[s]] for s in senders if node[s] != node[rank]]
            ends += [uplink_in[node[rank]] for s in senders if node[s] != node[rank]]
            if (copies_RR * away_RR)[rank].any():
                ends.append(uplink_out[node[rank]])
        leave.append(max(ends))
    return np.array(leave)
