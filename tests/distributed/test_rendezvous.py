import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.distributed.rendezvous import LOOPBACK, MeetingPlace, MeetingWish, plan_meeting
from albireo.errors import LaunchError


@pytest.mark.parametrize(
    ("wish", "endpoint"),
    [
        (MeetingWish(), "127.0.0.1:0"),
        (MeetingWish(master_port=29501), "127.0.0.1:29501"),
        (MeetingWish(node_rank=0, master_addr="localhost"), "127.0.0.1:0"),
        (MeetingWish(backend="c10d", endpoint="localhost:0"), "127.0.0.1:0"),
        (MeetingWish(endpoint="127.0.0.1:29400"), "127.0.0.1:29400"),
        (MeetingWish(backend="static", endpoint="[::1]:4"), "127.0.0.1:4"),
    ],
)
def test_one_machine_keeps_to_itself(wish: MeetingWish, endpoint: str) -> None:
    place = plan_meeting(wish)
    assert (place.backend, place.endpoint) == (LOOPBACK, endpoint)


@pytest.mark.parametrize(
    ("wish", "place"),
    [
        (
            MeetingWish(nodes=(2, 2), node_rank=1, master_addr="10.0.0.1"),
            MeetingPlace("static", "10.0.0.1:29500", {"rank": 1}),
        ),
        (
            MeetingWish(nodes=(2, 2), node_rank=1, master_addr="10.0.0.1", master_port=0),
            MeetingPlace("static", "10.0.0.1:0", {"rank": 1}),
        ),
        # As torch's launcher has it: an endpoint with a number is a static one.
        (
            MeetingWish(nodes=(2, 2), node_rank=0, endpoint="host:7"),
            MeetingPlace("static", "host:7", {"rank": 0}),
        ),
        (MeetingWish(nodes=(1, 4), endpoint="host"), MeetingPlace("c10d", "host:29400")),
        (MeetingWish(nodes=(1, 4), endpoint="[2001:db8::1]"), MeetingPlace("c10d", "[2001:db8::1]:29400")),
        (MeetingWish(nodes=(1, 4), endpoint="[2001:db8::1]:5"), MeetingPlace("c10d", "[2001:db8::1]:5")),
        # An address that is not the machine's own asks for the network.
        (MeetingWish(master_addr="10.0.0.1"), MeetingPlace("static", "10.0.0.1:29500", {"rank": 0})),
    ],
)
def test_several_machines_meet_where_the_user_says(wish: MeetingWish, place: MeetingPlace) -> None:
    assert plan_meeting(wish) == place


def test_what_has_no_effect_is_said() -> None:
    wish = MeetingWish((2, 2), node_rank=1, master_addr="a", master_port=1, backend="c10d", endpoint="host:7")
    place = plan_meeting(wish)
    assert (place.backend, place.endpoint, dict(place.options)) == ("c10d", "host:7", {})
    assert [note.split()[0] for note in place.notes] == ["--master-addr", "--master-port", "--node-rank"]


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (MeetingWish(nodes=(2, 2)), "needs a place to meet"),
        (MeetingWish(nodes=(2, 2), backend="c10d"), "needs a place to meet"),
        (MeetingWish(nodes=(2, 2), master_addr="10.0.0.1"), "needs --node-rank"),
        (MeetingWish(nodes=(2, 2), node_rank=2, master_addr="10.0.0.1"), "must be below --nnodes"),
        (MeetingWish(node_rank=1), "must be below --nnodes"),
        (MeetingWish(nodes=(1, 2), node_rank=0, master_addr="10.0.0.1"), "is a range"),
        (MeetingWish(nodes=(2, 2), endpoint="host:port"), "HOST:PORT"),
        (MeetingWish(nodes=(2, 2), endpoint="host:99999"), "HOST:PORT"),
        (MeetingWish(nodes=(2, 2), endpoint=":29500"), "HOST:PORT"),
    ],
)
def test_what_cannot_work_is_refused(wish: MeetingWish, said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        plan_meeting(wish)


@given(
    least=st.integers(1, 3),
    more=st.integers(0, 2),
    node_rank=st.none() | st.integers(0, 4),
    master_addr=st.sampled_from([None, "127.0.0.1", "10.0.0.1"]),
    master_port=st.none() | st.integers(0, 65535),
    backend=st.sampled_from([None, "static", "c10d"]),
    endpoint=st.sampled_from([None, "10.0.0.1", "10.0.0.1:5", "localhost:6"]),
)
def test_nothing_meets_on_a_network_that_nobody_named(
    least: int,
    more: int,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
    backend: str | None,
    endpoint: str | None,
) -> None:
    wish = MeetingWish((least, least + more), node_rank, master_addr, master_port, backend, endpoint)
    try:
        place = plan_meeting(wish)
    except LaunchError:
        return
    if place.backend == LOOPBACK:
        assert wish.nodes == (1, 1)
        assert place.endpoint.startswith("127.0.0.1:")
    else:
        assert "10.0.0.1" in place.endpoint or wish.nodes[1] > 1
        # static needs a number for each machine, and c10d none.
        assert ("rank" in place.options) == (place.backend == "static")
        assert place.backend != "static" or wish.nodes == (1, 1) or place.options["rank"] == node_rank
