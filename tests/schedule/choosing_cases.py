"""Small clusters for the tests of schedules."""

from hypothesis import strategies as st

from placer.core.cluster import ClusterSpec, Compute, LinkClass


def cluster_of(
    nodes: int,
    ranks_per_node: int,
    *,
    intra: tuple[float, ...] = (100.0, 3.0),
    inter: tuple[float, ...] = (10.0, 8.0),
    uplink: tuple[float, ...] | None = None,
) -> ClusterSpec:
    """A cluster whose links are (gigabytes/s, alpha in us, tail)."""
    links = {"intra": intra, "inter": inter, "uplink": uplink}
    names = ("gbytes_per_s", "alpha_us", "tail")
    return ClusterSpec(
        name="cluster",
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        memory_gib=1.0,
        compute=Compute(tflops=1.0, weight_read_gbytes_per_s=100.0),
        **{
            key: None if link is None else LinkClass(**dict(zip(names, link, strict=False)))
            for key, link in links.items()
        },
    )


@st.composite
def clusters(draw: st.DrawFn, *, most: int = 4) -> ClusterSpec:
    def link() -> tuple[float, ...]:
        return (
            draw(st.sampled_from([0.7, 1.0, 13.0])),
            draw(st.sampled_from([0.0, 0.3333, 2.0])),
            draw(st.sampled_from([1.0, 1.3])),
        )

    return cluster_of(
        draw(st.integers(1, most)),
        draw(st.integers(1, most)),
        intra=link(),
        inter=link(),
        uplink=link() if draw(st.booleans()) else None,
    )
