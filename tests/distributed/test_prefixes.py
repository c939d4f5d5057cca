"""A gang whose prompts are in the cache, and one whose prompts hold back for another rank's streams."""

from protos import gang_pb2
from tests.distributed.gang import Router, start_gang
from tests.exactness import Exactness, Written
from tests.local_engine import prompt


def first_outputs(router: Router) -> dict[int, gang_pb2.SequenceOutput]:
    """Of each sequence, what came with its first token."""
    outputs: dict[int, gang_pb2.SequenceOutput] = {}
    for message in router.messages:
        for output in message.outputs:
            outputs.setdefault(output.sequence_id, output)
    return outputs


async def test_a_prompt_that_was_there_before(maverick: Written, exactness: Exactness) -> None:
    whole = prompt(1, 150)
    async with start_gang(maverick.folder, 2, kv_memory_bytes=2**22) as gang:
        routers = [Router(gang, rank) for rank in gang.ranks]
        asked = {1: whole[:120], 2: whole[:120], 3: whole, 4: whole[:40] + prompt(2, 9)}
        for number, ids in asked.items():
            # One after the other at each rank, both ranks at once: their steps differ in what they compute.
            for router in routers:
                router.submit(number, ids, 12)
            for router in routers:
                await router.all_finished([number])
        for router in routers:
            cached = {number: output.cached_tokens for number, output in first_outputs(router).items()}
            # What was put out behind 120 tokens is not what the third prompt goes on with.
            assert cached == {1: 0, 2: 112, 3: 112, 4: 32}
            for number, ids in asked.items():
                exactness.check(maverick.reference, ids, router.outputs[number], f"request {number}")
        # What is kept is not in use.
        await gang.idle(5)


async def test_prompts_beside_another_ranks_streams(maverick: Written, exactness: Exactness) -> None:
    """With the bound at work, that ranks make from each other's work: all ends, all is right, nobody parks too soon."""
    async with start_gang(maverick.folder, 3, kv_memory_bytes=2**23, prefill_step_ratio=1.5) as gang:
        routers = [Router(gang, rank) for rank in gang.ranks]
        streams = [prompt(rank, 1 + 20 * rank) for rank in gang.ranks]
        for router, ids in zip(routers, streams, strict=True):
            router.submit(0, ids, 150)
        await routers[0].wait("tokens", lambda: len(routers[0].outputs[0]) > 10)
        prompts = {number: prompt(10 + number, 200 + 30 * number) for number in range(1, 7)}
        for number, ids in prompts.items():
            routers[number % 3].submit(number, ids, 5)
        for rank, router in enumerate(routers):
            await router.all_finished([0, *(number for number in prompts if number % 3 == rank)])
            exactness.check(maverick.reference, streams[rank], router.outputs[0], f"the stream of rank {rank}")
        for number, ids in prompts.items():
            exactness.check(maverick.reference, ids, routers[number % 3].outputs[number], f"prompt {number}")
        await gang.idle(5)
