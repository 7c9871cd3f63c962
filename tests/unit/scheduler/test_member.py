"""How the processes of an engine are called."""

from sidp_sgl.scheduler.member import Member, members


def test_tensor_parallel_ranks_are_named_where_there_are_several() -> None:
    assert str(Member(1)) == "DP rank 1"
    assert str(Member(1, 0, 2)) == "DP rank 1, TP rank 0"


def test_an_engine_has_every_member_once() -> None:
    assert list(members(2, 1)) == [Member(0), Member(1)]
    four = list(members(2, 2))
    assert len({str(member) for member in four}) == len(set(four)) == 4
    assert [member.dp_rank for member in four if member.tp_rank == 1] == [0, 1], "a group"
