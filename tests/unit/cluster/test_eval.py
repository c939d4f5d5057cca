from hypothesis import given
from hypothesis import strategies as st

from cluster.eval import windows


@given(num_tokens=st.integers(2, 500), window=st.integers(2, 80), data=st.data())
def test_windows_score_every_token_but_the_first_once_with_enough_before_it(
    num_tokens: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window - 1))
    scored: list[int] = []
    for item in windows(num_tokens, window, stride):
        assert item.end - item.start <= window
        assert item.scored_from > item.start, "a window's first token has nothing before it"
        assert item.start == 0 or item.scored_from - item.start >= window - stride
        scored += range(item.scored_from, item.end)
    assert scored == list(range(1, num_tokens))
