"""The exactness rule itself: it lets nothing through that it should not."""

import pytest
import torch

from tests.exactness import Exactness, Reference, Written
from tests.local_engine import LocalRank, engine_config, greedy, prompt


@pytest.fixture
def followed(maverick: Written) -> tuple[list[int], list[int]]:
    ids = prompt(4, 30)
    (output,) = LocalRank(engine_config(maverick.folder)).generate([greedy(0, ids, 20)])
    return ids, output


def test_a_wrong_token_is_a_failure(maverick: Written, followed: tuple[list[int], list[int]]) -> None:
    ids, output = followed
    exactness = Exactness()
    exactness.check(maverick.reference, ids, output)
    for position in (0, 7, 19):
        wrong = [*output[:position], (output[position] + 1) % 320, *output[position + 1 :]]
        with pytest.raises(AssertionError, match=f"token {position} of the output is {wrong[position]}"):
            exactness.check(maverick.reference, ids, wrong, "this one")
    assert (exactness.compared, exactness.excused) == (4, [])


@pytest.mark.parametrize("hesitates", ["tokens", "experts"])
def test_a_hesitating_reference_excuses_what_follows(
    maverick: Written, followed: tuple[list[int], list[int]], hesitates: str
) -> None:
    ids, output = followed
    reference = Reference(maverick.reference.model)
    reference.logits(ids + output)
    original = reference.logits

    def logits(token_ids: list[int]) -> torch.Tensor:
        values = original(token_ids)
        if hesitates == "tokens":
            # At output position 9.
            row = values[len(ids) + 8]
            row[row.topk(2).indices[1]] = row.max() - 1e-5
        else:
            # In the third MoE layer, at the prompt's last token.
            row = reference._router_logits[2][len(ids) - 1]
            row[row.topk(2).indices[1]] = row.max() - 1e-5
        return values

    reference.logits = logits  # type: ignore[method-assign]
    exactness = Exactness()
    late = [*output[:12], (output[12] + 1) % 320, *output[13:]]
    exactness.check(reference, ids, late, "late")
    assert len(exactness.excused) == 1
    early = [*output[:3], (output[3] + 1) % 320, *output[4:]]
    if hesitates == "tokens":
        with pytest.raises(AssertionError):
            exactness.check(reference, ids, early, "early")
    else:
        exactness.check(reference, ids, early, "early")


def test_more_than_one_in_a_hundred_is_a_failure() -> None:
    Exactness().verify()
    Exactness(compared=100, excused=["a"]).verify()
    with pytest.raises(AssertionError, match="99 sequences compared, 1 excused"):
        Exactness(compared=99, excused=["a"]).verify()
