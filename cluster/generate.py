"""`caravan generate`: one prompt in, its continuation out as it comes."""

import argparse
import json
import sys

import grpc

from cluster.errors import CommandError, ExitCode, ServerError, UsageError
from protos import inference_pb2
from protos.client import Client, Completion, add_response, make_request
from protos.errors import CaravanError

# What the request itself is at fault for; everything else is the server's, or the way's to it.
USER_STATUS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
)


def run(arguments: argparse.Namespace) -> int:
    """Stream the answer to stdout.

    Raises:
        UsageError: the prompt or a parameter cannot work.
        ServerError: the server failed or is not there.
    """
    request = make_request(
        _token_ids(arguments.prompt) if arguments.token_ids else arguments.prompt,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
    )
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    completion = Completion()
    detail = ""
    try:
        with Client(arguments.address) as client:
            for response in client.generate(request):
                add_response(completion, response)
                detail = response.detail
                if not arguments.json:
                    print(response.text, end="", flush=True)
    except CaravanError as error:
        if completion.text and not arguments.json:
            print(flush=True)
        raise command_error(error) from None
    print(_as_json(completion) if arguments.json else "", flush=True)
    if completion.finish_reason == "error":
        raise ServerError(detail or "the server ended the stream without a reason")
    return ExitCode.OK


def command_error(error: CaravanError) -> CommandError:
    """The exit that a call's status means."""
    return UsageError(error.message) if error.code in USER_STATUS else ServerError(error.message)


def _token_ids(text: str) -> list[int]:
    ids = []
    for word in text.split():
        if not word.isdecimal() or int(word) >= 2**32:
            raise UsageError(f"prompt: with --token-ids it is whole numbers with spaces between, but holds {word!r}")
        ids.append(int(word))
    return ids


def _as_json(completion: Completion) -> str:
    usage: inference_pb2.Usage = completion.usage
    return json.dumps(
        {
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "usage": {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens},
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )
