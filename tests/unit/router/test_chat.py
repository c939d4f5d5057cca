"""Chat templates, and what the model is known by."""

import json
import struct

import pytest
from transformers import PreTrainedTokenizerFast

from protos import inference_pb2
from router.chat_template import ChatTemplate, ChatTemplateError
from router.errors import InvalidRequest, RouterConfigError
from router.fingerprint import checkpoint_digest, fingerprint
from router.tokenizer import Tokenizer
from router.validation import Validator
from tests.unit.router.tiny_checkpoint import BEGIN, build_tokenizer, write_checkpoint

# The parts that matter of Llama 4's own: begin-of-text, headers, trimmed content, the date, a loop with a break.
LLAMA4 = """\
{{- bos_token }}
{%- if strftime_now is defined %}{% set date = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- "<|header_start|>system<|header_end|>\\n\\n" + system + " (" + date + ")<|eot|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {%- if loop.index > 3 %}{%- break %}{%- endif %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
    {%- generation %}{{- message['content'] | trim + '<|eot|>' }}{%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""
MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "the sea & <the> whale? 'über' 世界"},
    {"role": "assistant", "content": "whale\n"},
    {"role": "user", "content": "you"},
]
NOON = 1_763_726_400  # 21 November 2025


@pytest.fixture
def template() -> ChatTemplate:
    return ChatTemplate(LLAMA4, {"bos_token": "<|begin_of_text|>"})


def chat(*messages: tuple[str, str], **fields) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        chat=inference_pb2.ChatMessages(
            messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
        ),
        **fields,
    )


def test_it_renders(template):
    assert template.render(MESSAGES, NOON) == (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief. (21 Nov 2025)<|eot|>"
        "<|header_start|>user<|header_end|>\n\nthe sea & <the> whale? 'über' 世界<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nwhale<|eot|>"
        "<|header_start|>user<|header_end|>\n\nyou<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )


@pytest.mark.parametrize(
    "source",
    [
        LLAMA4.replace("date", "'today'").replace("set 'today' =", "set x ="),
        "{% for m in messages %}\n  {% if m.content %}\n{{ m | tojson }}\n  {% endif %}\n{% endfor %}\n",
        "{{ messages | tojson(indent=2) }}{{ eos_token }}|{{ tools is none }}|{{ documents is none }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
def test_it_renders_as_transformers_does(source):
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"}
    reference = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), **special)
    expected = reference.apply_chat_template(MESSAGES, chat_template=source, add_generation_prompt=True, tokenize=False)
    assert ChatTemplate(source, special).render(MESSAGES, NOON) == expected


def test_begin_of_text_is_there_once(config, model, tokenizer, template):
    for source in (LLAMA4, LLAMA4.replace("{{- bos_token }}", "")):
        validator = Validator(config, model, tokenizer, ChatTemplate(source, {"bos_token": "<|begin_of_text|>"}))
        valid = validator.check(chat(("user", "the sea"), chat_time=NOON), 256)
        assert valid.prompt_ids.count(BEGIN) == 1 and valid.prompt_ids[0] == BEGIN
        assert tokenizer.decode(valid.prompt_ids, keep_special_tokens=True).endswith(
            "<|begin_of_text|><|header_start|>user<|header_end|>\n\nthe sea<|eot|>"
            "<|header_start|>assistant<|header_end|>\n\n"
        )
        assert valid.chat_time == NOON


def test_bad_chats_are_the_client_s_fault(config, model, tokenizer, template):
    validator = Validator(config, model, tokenizer, template)
    for request, sentence in (
        (chat(), "chat: needs 1 to 4096 messages, got 0"),
        (chat(*[("user", "a")] * 4097), "got 4097"),
        (chat(("", "hi")), "chat: a role has 1 to 64 characters; message 0 has 0"),
        (chat(("user", "a"), ("x" * 65, "hi")), "message 1 has 65"),
        (chat(("pirate", "arr")), "chat: the checkpoint's chat template refuses the messages: unknown role pirate"),
        (chat(("user", "x" * (5 * 2**20))), "chat: at most 4194304 bytes of text"),
        (chat(("user", "é" * (3 * 2**20))), "chat: at most 4194304 bytes of text"),
        (chat(("user", "zqj" * 200)), "chat: the prompt has"),
        (chat(("user", "a"), chat_time=-1), "chat_time: must be"),
        (chat(("user", "a"), chat_time=2**62), "chat_time: must be"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            validator.check(request, 256)
        assert sentence in caught.value.message


def test_a_template_cannot_reach_out():
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
    ):
        with pytest.raises(ChatTemplateError):
            ChatTemplate(source, {}).render(MESSAGES, NOON)


def test_where_it_is_found(tmp_path):
    assert ChatTemplate.from_folder(tmp_path) is None
    settings = {"chat_template": "a{{ bos_token }}{{ eos_token }}", "bos_token": "B", "eos_token": {"content": "E"}}

    def rendered(**changes) -> str:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, **changes}))
        template = ChatTemplate.from_folder(tmp_path)
        assert template is not None
        return template.render(MESSAGES, NOON)

    assert rendered() == "aBE"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert rendered(chat_template=several) == "yes"
    (tmp_path / "chat_template.jinja").write_text("b{{ bos_token }}")
    assert rendered() == "bB"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(RouterConfigError, match="the chat template cannot be read"):
        ChatTemplate.from_folder(tmp_path)
    for content in ("[]", "{"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(RouterConfigError):
            ChatTemplate.from_folder(tmp_path)


async def test_chats_through_the_router(build, config, tmp_path):
    folder = write_checkpoint(tmp_path / "tiny")
    (folder / "chat_template.jinja").write_text(LLAMA4)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin_of_text|>"}))
    house = await build(config=type(config)(model_dir=folder, reconnect_max_s=0.1))
    request = chat(("system", "x"), ("user", "the sea"), max_tokens=3, ignore_eos=True)
    first = await house.inference.GenerateOnce(request)
    assert first.chat_time > NOON
    model = await house.inference.GetModel(inference_pb2.GetModelRequest())
    assert model.has_chat_template and model.fingerprint == ""
    # Its time makes it the same prompt later.
    request.chat_time = NOON
    assert (await house.inference.GenerateOnce(request)).chat_time == NOON
    tokenizer = Tokenizer.from_folder(folder, 1000)
    assert "21 Nov 2025" in tokenizer.decode(house.ranks[0].submits[1].prompt_ids)


def write_weights(path, tensors: dict[str, bytes], metadata: str = "") -> None:
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = {"made": metadata}
    for name, values in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(values)], "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def test_a_fingerprint_tells_checkpoints_apart(tmp_path):
    folder = write_checkpoint(tmp_path / "a", temperature=0.5)
    assert checkpoint_digest(folder, "") == fingerprint("", "float32") == ""
    weights = {"x": bytes(range(200)) * 50, "y": b"short", "none": b""}
    write_weights(folder / "model.safetensors", weights)
    first = checkpoint_digest(folder, "template")
    assert len(first) == len(fingerprint(first, "float32")) == 64
    assert fingerprint(first, "float32") != fingerprint(first, "bfloat16")
    # Cut into files in another way, by another version of the tools, it is the same.
    (folder / "model.safetensors").unlink()
    write_weights(folder / "1.safetensors", {"y": weights["y"]}, metadata="elsewhere")
    write_weights(folder / "2.safetensors", {"none": b"", "x": weights["x"]})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"transformers_version": "9", **config}))
    assert checkpoint_digest(folder, "template") == first
    different = {checkpoint_digest(folder, "other template"), first}
    write_weights(folder / "2.safetensors", {"none": b"", "x": b"\xff" + weights["x"][1:]})
    different.add(checkpoint_digest(folder, "template"))
    write_weights(folder / "2.safetensors", {"none": b"", "z": weights["x"]})
    different.add(checkpoint_digest(folder, "template"))
    write_weights(folder / "2.safetensors", {"none": b"", "x": weights["x"]})
    for file in ("config.json", "tokenizer.json", "generation_config.json"):
        before = (folder / file).read_text()
        (folder / file).write_text(json.dumps({**json.loads(before), "something": 1}))
        different.add(checkpoint_digest(folder, "template"))
        (folder / file).write_text(before)
    assert len(different) == 7 and checkpoint_digest(folder, "template") == first
    (folder / "2.safetensors").write_bytes(b"\xff" * 100)
    assert checkpoint_digest(folder, "template") == ""
