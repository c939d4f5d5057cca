import json
import math
import pickle

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import inference_pb2
from router.config import RouterConfig
from router.errors import InvalidRequest, RouterConfigError
from router.model_info import ModelInfo, SamplingDefaults
from router.validation import Validator
from tests.unit.router.tiny_checkpoint import BEGIN, END, EOT, write_checkpoint

CONTEXT = 64


@pytest.fixture
def validator(config, model, tokenizer) -> Validator:
    return Validator(config, model, tokenizer)


def request(**fields) -> inference_pb2.GenerateRequest:
    ids = fields.pop("ids", None)
    if ids is not None:
        fields["token_ids"] = inference_pb2.TokenIds(ids=ids)
    elif "text" not in fields and not fields.pop("no_prompt", False):
        fields["text"] = "the sea"
    return inference_pb2.GenerateRequest(**fields)


BAD = [
    ("model", {"model": "gpt"}, "'gpt' is not served here; this is 'tiny'"),
    ("prompt", {"no_prompt": True}, "set text, token_ids or chat"),
    ("text", {"text": ""}, "the prompt is empty"),
    ("text", {"text": "x" * (10 * 2**20)}, "at most 4194304 bytes of text, got 10485760"),
    ("text", {"text": "é" * (2 * 2**20 + 1)}, "at most 4194304 bytes of text, got 4194306"),
    ("text", {"text": "zqj" * 100}, "the context takes 64"),
    ("token_ids", {"ids": []}, "the prompt is empty"),
    ("token_ids", {"ids": [5, 2**32 - 1, 6]}, "4294967295 at position 1 is no token"),
    ("token_ids", {"ids": [5] * 64}, "the prompt has 64 tokens"),
    ("request_id", {"request_id": "r" * 257}, "at most 256 characters"),
    ("max_tokens", {"max_tokens": 0}, "at least 1, got 0"),
    ("max_tokens", {"ids": [5] * 60, "max_tokens": 5}, "ask for at most 4"),
    ("max_tokens", {"max_tokens": 2**32 - 1}, "pass the context of 64"),
    ("min_tokens", {"max_tokens": 4, "min_tokens": 5}, r"5 is more than max_tokens \(4\)"),
    ("min_tokens", {"ids": [5] * 60, "min_tokens": 5}, r"5 is more than max_tokens \(4\)"),
    ("temperature", {"temperature": -0.1}, "at least 0, got -0.1"),
    ("top_p", {"top_p": 0.0}, "more than 0 and at most 1, got 0"),
    ("top_p", {"top_p": 1.1}, "more than 0 and at most 1"),
    ("min_p", {"min_p": -0.1}, "at least 0 and at most 1"),
    ("min_p", {"min_p": 1.1}, "at least 0 and at most 1"),
    ("repetition_penalty", {"repetition_penalty": 0.0}, "more than 0"),
    ("presence_penalty", {"presence_penalty": 2.1}, "at least -2 and at most 2"),
    ("frequency_penalty", {"frequency_penalty": -2.1}, "at least -2 and at most 2"),
    ("logprobs", {"logprobs": 21}, "at most 20, got 21"),
    ("prompt_logprobs", {"prompt_logprobs": 21}, "at most 20, got 21"),
    ("tenant", {"tenant": "t" * 65}, "at most 64 characters, got 65"),
    ("priority", {"priority": 11}, "from -10 to 10, got 11"),
    ("priority", {"priority": -11}, "from -10 to 10, got -11"),
    ("timeout_s", {"timeout_s": 0.0}, "more than 0, got 0"),
    ("timeout_s", {"timeout_s": -1.0}, "more than 0, got -1"),
    ("timeout_s", {"timeout_s": math.nan}, "more than 0, got nan"),
    ("timeout_s", {"timeout_s": math.inf}, "more than 0, got inf"),
    ("chat_time", {"chat_time": 0}, "more than 0, got 0"),
    ("request_id", {"resumable": True}, "is missing; a resumable request is known by it"),
    ("resume_offset", {"resume_offset": 1}, "is for resumable requests"),
    ("resume_offset", {"resume_offset": 6, "resumable": True, "request_id": "r", "max_tokens": 5}, "more than max_tok"),
    ("chat", {"no_prompt": True, "chat": inference_pb2.ChatMessages()}, "the checkpoint has no chat template"),
    ("token_ids", {"ids": [5] * 65, "max_tokens": 0, "prompt_logprobs": 0}, "the prompt has 65 tokens"),
    ("stop", {"stop": ["a"] * 17}, "at most 16"),
    ("stop", {"stop": ["a", ""]}, "number 1 has 0"),
    ("stop", {"stop": ["a" * 257]}, "number 0 has 257"),
    ("stop_token_ids", {"stop_token_ids": [1] * 65}, "at most 64"),
    ("stop_token_ids", {"stop_token_ids": [10**6]}, "1000000 at position 0 is no token"),
    *(
        (field, {field: value}, "must be a number")
        for field in (
            "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        )
        for value in (math.nan, math.inf, -math.inf)
    ),
]  # fmt: skip


@pytest.mark.parametrize(("field", "fields", "sentence"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_names_its_field(validator, field, fields, sentence):
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        validator.check(request(**fields), CONTEXT)
    assert caught.value.field == field
    assert caught.value.message.startswith(f"{field}: ")
    assert len(caught.value.message) < 200


def test_long_texts_are_refused_before_they_are_tokenized(validator, monkeypatch):
    monkeypatch.setattr(validator._tokenizer, "encode", lambda text: pytest.fail("tokenized"))
    with pytest.raises(InvalidRequest):
        validator.check(request(text="x" * (4 * 2**20 + 1)), CONTEXT)
    with pytest.raises(InvalidRequest):
        validator.check(request(text="the sea", temperature=-1), CONTEXT)


def test_defaults(validator):
    valid = validator.check(request(), CONTEXT)
    assert valid.prompt_ids[0] == BEGIN
    assert valid.max_tokens == CONTEXT - len(valid.prompt_ids)
    assert valid.stop_token_ids == {END, EOT}
    assert (valid.sampling.temperature, valid.sampling.top_p, valid.sampling.top_k) == (0.6, 1, 0)
    assert valid.sampling.repetition_penalty == 1 and not valid.sampling.HasField("logprobs")
    assert valid.request_id and valid.request_id != validator.check(request(), CONTEXT).request_id
    assert valid.sampling.seed != validator.check(request(), CONTEXT).sampling.seed
    assert validator.check(request(), 10**6).max_tokens == 1024


def test_what_is_asked_for_is_kept(validator):
    fields = {"temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.25, "repetition_penalty": 1.5, "seed": 2**64 - 1}
    fields |= {"presence_penalty": -2.0, "frequency_penalty": 2.0, "logprobs": 0}
    valid = validator.check(
        request(**fields, ids=[7, 8], stop_token_ids=[9], ignore_eos=True, stop=["a"], max_tokens=62, min_tokens=62,
                request_id="mine", model="tiny"), CONTEXT,
    )  # fmt: skip
    assert {name: getattr(valid.sampling, name) for name in fields} == fields
    assert valid.sampling.HasField("logprobs")
    assert (valid.prompt_ids, valid.stop, valid.stop_token_ids) == ((7, 8), ("a",), {9})
    assert (valid.max_tokens, valid.min_tokens, valid.request_id) == (62, 62, "mine")


@given(raw=st.binary(max_size=80))
def test_no_bytes_make_it_fall(checkpoint, tokenizer, raw):
    validator = Validator(RouterConfig(model_dir=checkpoint), ModelInfo.from_folder(checkpoint), tokenizer)
    try:
        message = inference_pb2.GenerateRequest.FromString(raw)
    except Exception:
        return
    try:
        valid = validator.check(message, CONTEXT)
    except InvalidRequest:
        return
    assert len(valid.prompt_ids) + valid.max_tokens <= CONTEXT


def test_model_info(tmp_path, checkpoint):
    model = ModelInfo.from_folder(checkpoint)
    assert (model.name, model.num_layers, model.num_moe_layers, model.num_experts) == ("tiny", 4, 2, 8)
    assert model.eos_token_ids == (END, EOT)
    folder = write_checkpoint(tmp_path / "m")
    assert ModelInfo.from_folder(folder).eos_token_ids == (END,)
    text = json.loads((folder / "config.json").read_text())
    text |= {"eos_token_id": [1, 10**7], "moe_layers": [1, 2, 3], "model_type": "llama4_text"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": text}))
    nested = ModelInfo.from_folder(folder, "served")
    assert (nested.name, nested.eos_token_ids, nested.num_moe_layers) == ("served", (1,), 3)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"temperature": 0.6, "top_p": 0.9}, SamplingDefaults(0.6, 0.9)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 40}, SamplingDefaults(0.6, 1, 40)),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 40}, SamplingDefaults()),
        ({"temperature": None}, SamplingDefaults()),
    ],
)
def test_sampling_defaults(tmp_path, generation, expected):
    assert ModelInfo.from_folder(write_checkpoint(tmp_path, **generation)).defaults == expected


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.json", None, r"is not a checkpoint: it has no config\.json"),
        ("config.json", "{", "cannot be read as JSON"),
        ("config.json", "[]", "must hold a JSON object"),
        ("config.json", '{"model_type": "gpt2"}', "model_type is 'gpt2'"),
        ("config.json", '{"model_type": "llama4_text", "vocab_size": -1}', "vocab_size must be a whole number"),
        ("generation_config.json", '{"top_p": 7}', "top_p must be more than 0"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature must be a number"),
    ],
)
def test_folders_that_cannot_be_served(tmp_path, name, content, sentence):
    write_checkpoint(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RouterConfigError, match=sentence) as caught:
        ModelInfo.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_router_config_bounds(tmp_path):
    assert RouterConfig(model_dir=tmp_path / "nano").model_name == "nano"
    with pytest.raises(RouterConfigError, match="stream_stall_s"):
        RouterConfig(model_dir=tmp_path, stream_stall_s=math.nan)


def test_errors_survive_pickling():
    error = InvalidRequest("text", "is empty " * 200)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.code, copy.message, str(copy)) == (grpc.StatusCode.INVALID_ARGUMENT, error.message, str(error))
    assert len(error.details) == 1024
