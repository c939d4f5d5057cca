"""How scenes of replay begin; the fixture `play` runs them."""

from protos import inference_pb2
from tests.unit.router.replay_world import World

LONG = {"text": "the sea", "max_tokens": 30, "ignore_eos": True, "seed": 5, "temperature": 1.0}


def request(**fields) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**{**LONG, **fields})


async def begin(world: World, count: int = 1, tokens: int = 3, **fields) -> None:
    """So many calls, and as many turns as `tokens`."""
    for number in range(count):
        world.call(request(request_id=f"r{len(world.calls)}", sibling=number, **fields))
    await world.settle()
    for _ in range(tokens):
        await world.turn()


def whole_answer(play, **fields) -> list[int]:
    """Tokens of the first call of `begin`, undisturbed."""
    answer: list[int] = []

    async def scene(world: World) -> None:
        await begin(world, **fields)
        await world.heal()
        answer.extend(world.calls[0].done.token_ids)

    play(scene)
    return answer
