import json

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

from protos.breaking import RELEASED, broken_promises, current, main, read, write


def message(file: FileDescriptorProto, name: str):
    return next(one for one in file.message_type if one.name == name)


def field(file: FileDescriptorProto, name: str, number: int):
    return next(one for one in message(file, name).field if one.number == number)


def method(file: FileDescriptorProto, name: str):
    return next(one for service in file.service for one in service.method if one.name == name)


def drop(repeated, name: str) -> None:
    del repeated[[one.name for one in repeated].index(name)]


def rename(one, name: str) -> None:
    one.name = name


BREAKAGES = [
    (lambda f: setattr(f, "package", "caravan.v2"), "package caravan.v1 is now caravan.v2"),
    (lambda f: drop(f.message_type, "TokenLogprob"), "message TokenLogprob is gone"),
    (lambda f: drop(message(f, "Usage").field, "prompt_tokens"), "Usage.prompt_tokens (number 1) is gone"),
    (lambda f: rename(field(f, "Usage", 1), "tokens"), "its name was prompt_tokens, and is tokens"),
    (lambda f: setattr(field(f, "Usage", 1), "number", 9), "Usage.prompt_tokens (number 1) is gone"),
    (
        lambda f: setattr(field(f, "Usage", 1), "type", FieldDescriptorProto.TYPE_UINT64),
        "type was uint32, and is uint64",
    ),
    (
        lambda f: setattr(field(f, "Usage", 1), "label", FieldDescriptorProto.LABEL_REPEATED),
        "its label was optional, and is repeated",
    ),
    (
        lambda f: setattr(field(f, "GenerateResponse", 5), "type_name", ".caravan.v1.Model"),
        "its type was .caravan.v1.Usage, and is .caravan.v1.Model",
    ),
    (
        lambda f: setattr(field(f, "GenerateRequest", 5), "proto3_optional", False),
        "GenerateRequest.max_tokens (number 5): its presence was optional, and is implicit",
    ),
    (
        lambda f: field(f, "GenerateRequest", 2).ClearField("oneof_index"),
        "GenerateRequest.text (number 2): its oneof was prompt, and is none",
    ),
    (lambda f: drop(f.enum_type, "FinishReason"), "enum FinishReason is gone"),
    (
        lambda f: rename(f.enum_type[0].value[1], "FINISH_REASON_DONE"),
        "FinishReason.FINISH_REASON_STOP (number 1) is now FINISH_REASON_DONE",
    ),
    (lambda f: drop(f.enum_type[0].value, "FINISH_REASON_ERROR"), "FINISH_REASON_ERROR (number 4) is gone"),
    (lambda f: drop(f.service, "Admin"), "service Admin is gone"),
    (lambda f: drop(f.service[0].method, "Tokenize"), "Inference/Tokenize is gone"),
    (
        lambda f: setattr(method(f, "Generate"), "server_streaming", False),
        "was .caravan.v1.GenerateRequest -> stream .caravan.v1.GenerateResponse, and is",
    ),
    (lambda f: setattr(method(f, "Generate"), "client_streaming", True), "Inference/Generate was"),
    (lambda f: setattr(method(f, "GetModel"), "output_type", ".caravan.v1.Status"), "Inference/GetModel was"),
]


@pytest.mark.parametrize(("change", "clause"), BREAKAGES, ids=[clause[:40] for _, clause in BREAKAGES])
def test_what_breaks_clients_is_found(change, clause):
    now = current()
    change(now)
    broken = broken_promises(current(), now)
    assert clause in broken[0] and len(broken) <= 2, broken


def test_additions_break_nobody():
    now = current()
    message(now, "Usage").field.add(name="new", number=99, type=FieldDescriptorProto.TYPE_BOOL)
    now.message_type.add(name="New")
    now.enum_type[0].value.add(name="FINISH_REASON_NEW", number=99)
    now.service[0].method.add(name="New", input_type=".caravan.v1.Usage", output_type=".caravan.v1.Usage")
    now.service.add(name="New")
    assert broken_promises(current(), now) == []


def test_nested_messages_and_enums_are_compared():
    released = current()
    nested = message(released, "Usage").nested_type.add(name="Inner")
    nested.enum_type.add(name="Kind").value.add(name="KIND_UNSPECIFIED", number=0)
    assert broken_promises(released, current()) == ["message Usage.Inner is gone", "enum Usage.Inner.Kind is gone"]


def test_the_contract_keeps_the_last_release_s_promises(capsys):
    assert main([]) == 0
    assert "keeps every promise of 0.1.0" in capsys.readouterr().out


def test_the_command_says_what_is_broken(tmp_path, capsys):
    released = tmp_path / "released.json"
    promised = current()
    promised.service[0].method.add(name="Gone", input_type=".caravan.v1.Usage", output_type=".caravan.v1.Usage")
    write(released, "9.9.9", promised)
    assert main([], released) == 1
    assert "breaks clients of 9.9.9: Inference/Gone is gone" in capsys.readouterr().err
    assert main(["--release", "10.0.0"], released) == 0
    assert read(released) == ("10.0.0", current())
    assert main([], released) == 0
    for content in ("", "{}", "[]", json.dumps({"release": "1", "contract": {"nothing": 1}})):
        released.write_text(content)
        assert main([], released) == 1
        assert "holds no contract" in capsys.readouterr().err
    assert main([], tmp_path / "missing.json") == 1
    assert RELEASED.name == "released.json"
