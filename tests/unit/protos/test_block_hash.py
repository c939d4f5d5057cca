"""Names of blocks: the same everywhere and for ever, equal only where the whole prefix is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.block_hash import BLOCK_HASH_BYTES, block_hash, block_hashes, root_hash

TOKENS = st.lists(st.integers(0, 3), max_size=12)


def test_names_never_change() -> None:
    """Routers and ranks of different releases must agree: a change here is a new version of the scheme."""
    assert root_hash().hex() == "ab8b3ef8759520d963b68bde921956dd"
    assert [name.hex() for name in block_hashes([1, 2, 3, 4, 5, 6, 2**32 - 1], 3)] == [
        "708ca2ff5f98c164c3ce067c1c69d132",
        "eb5b240c3c72422d036a6cd0bf7882a6",
    ]


@given(TOKENS, TOKENS, st.integers(1, 4))
def test_equal_names_mean_equal_prefixes(some: list[int], others: list[int], size: int) -> None:
    names, other_names = list(block_hashes(some, size)), list(block_hashes(others, size))
    assert len(names) == len(some) // size
    assert all(len(name) == BLOCK_HASH_BYTES for name in names)
    for number, name in enumerate(names):
        for other, other_name in enumerate(other_names):
            same = number == other and some[: (number + 1) * size] == others[: (number + 1) * size]
            assert (name == other_name) == same


def test_a_chain_goes_on_from_its_parent() -> None:
    first, second = block_hashes(range(8), 4)
    assert first == block_hash(root_hash(), range(4))
    assert second == block_hash(first, range(4, 8))


def test_namespaces_share_nothing() -> None:
    plain, of_tenant = (set(block_hashes([7] * 64, 4, namespace)) for namespace in ("", "tenant"))
    assert len(plain) == len(of_tenant) == 16
    assert not plain & of_tenant


@pytest.mark.parametrize("token", [-1, 2**32])
def test_no_token_id(token: int) -> None:
    with pytest.raises(OverflowError):
        block_hash(root_hash(), [token])
