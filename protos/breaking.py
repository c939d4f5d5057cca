"""Checks that caravan.v1 only adds to what the last release promised, so that no client of it breaks.

python -m protos.breaking                   exit 1 and a sentence for every promise that is broken
python -m protos.breaking --release 0.2.0   makes the contract as it is now the promise of that release
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf import json_format
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

from protos import inference_pb2

RELEASED = Path(__file__).resolve().parent / "released.json"


def current() -> FileDescriptorProto:
    """The contract as it is now."""
    file = FileDescriptorProto()
    inference_pb2.DESCRIPTOR.CopyToProto(file)
    return file


def read(path: Path) -> tuple[str, FileDescriptorProto]:
    """A release's name and its contract.

    Raises:
        ValueError, KeyError, TypeError, json_format.Error: the file holds none.
        OSError: it cannot be read.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["release"], json_format.ParseDict(content["contract"], FileDescriptorProto())


def write(path: Path, release: str, file: FileDescriptorProto) -> None:
    """Makes a contract the promise of a release."""
    content = {"release": release, "contract": json_format.MessageToDict(file)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def broken_promises(released: FileDescriptorProto, now: FileDescriptorProto) -> list[str]:
    """What a client of the released contract can no longer rely on, one clause each."""
    if released.package != now.package:
        return [f"package {released.package} is now {now.package}"]
    messages, enums = dict(_messages(now.message_type, "")), dict(_enums(now, ""))
    services = {service.name: service for service in now.service}
    broken: list[str] = []
    for name, message in _messages(released.message_type, ""):
        broken += _compare_messages(name, message, messages.get(name))
    for name, enum in _enums(released, ""):
        broken += _compare_enums(name, enum, enums.get(name))
    for service in released.service:
        broken += _compare_services(service, services.get(service.name))
    return broken


def _compare_messages(name: str, old: DescriptorProto, new: DescriptorProto | None) -> Iterator[str]:
    if new is None:
        yield f"message {name} is gone"
        return
    fields = {field.number: field for field in new.field}
    for field in old.field:
        other = fields.get(field.number)
        if other is None:
            yield f"{name}.{field.name} (number {field.number}) is gone"
            continue
        before, after = _describe(field, old), _describe(other, new)
        for what, value in before.items():
            if after[what] != value:
                yield f"{name}.{field.name} (number {field.number}): its {what} was {value}, and is {after[what]}"


def _describe(field: FieldDescriptorProto, message: DescriptorProto) -> dict[str, str]:
    kind = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    label = FieldDescriptorProto.Label.Name(field.label).removeprefix("LABEL_").lower()
    oneof = ""
    if field.HasField("oneof_index") and not field.proto3_optional:
        oneof = message.oneof_decl[field.oneof_index].name
    return {
        "name": field.name,
        "type": field.type_name or kind,
        "label": label,
        "presence": "optional" if field.proto3_optional else "implicit",
        "oneof": oneof or "none",
    }


def _compare_enums(name: str, old: EnumDescriptorProto, new: EnumDescriptorProto | None) -> Iterator[str]:
    if new is None:
        yield f"enum {name} is gone"
        return
    values = {value.number: value.name for value in new.value}
    for value in old.value:
        if value.number not in values:
            yield f"{name}.{value.name} (number {value.number}) is gone"
        elif values[value.number] != value.name:
            yield f"{name}.{value.name} (number {value.number}) is now {values[value.number]}"


def _compare_services(old: ServiceDescriptorProto, new: ServiceDescriptorProto | None) -> Iterator[str]:
    if new is None:
        yield f"service {old.name} is gone"
        return
    methods = {method.name: method for method in new.method}
    for method in old.method:
        other = methods.get(method.name)
        if other is None:
            yield f"{old.name}/{method.name} is gone"
        elif _signature(method) != _signature(other):
            yield f"{old.name}/{method.name} was {_signature(method)}, and is {_signature(other)}"


def _signature(method: MethodDescriptorProto) -> str:
    def side(type_name: str, is_stream: bool) -> str:
        return ("stream " if is_stream else "") + type_name

    return f"{side(method.input_type, method.client_streaming)} -> {side(method.output_type, method.server_streaming)}"


def _messages(messages: Iterable[DescriptorProto], prefix: str) -> Iterator[tuple[str, DescriptorProto]]:
    for message in messages:
        yield prefix + message.name, message
        yield from _messages(message.nested_type, f"{prefix}{message.name}.")


def _enums(scope: FileDescriptorProto | DescriptorProto, prefix: str) -> Iterator[tuple[str, EnumDescriptorProto]]:
    for enum in scope.enum_type:
        yield prefix + enum.name, enum
    for message in scope.message_type if isinstance(scope, FileDescriptorProto) else scope.nested_type:
        yield from _enums(message, f"{prefix}{message.name}.")


def main(arguments: list[str] | None = None, released: Path = RELEASED) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Check that the public contract only adds to the last release's.")
    parser.add_argument("--release", metavar="VERSION", help="make the contract as it is now that release's promise")
    release = parser.parse_args(arguments).release
    if release:
        write(released, release, current())
        print(f"protos/: the contract of {release} is kept in {released.name}")
        return 0
    try:
        name, contract = read(released)
    except (OSError, ValueError, KeyError, TypeError, json_format.Error) as error:
        print(f"protos/breaking.py: {released} holds no contract ({error})", file=sys.stderr)
        return 1
    broken = broken_promises(contract, current())
    for clause in broken:
        print(f"protos/inference.proto breaks clients of {name}: {clause}", file=sys.stderr)
    if not broken:
        print(f"protos/: caravan.v1 keeps every promise of {name}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
