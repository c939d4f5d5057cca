"""How a model is named, and what is said of a name that cannot be one."""

from pathlib import Path

import pytest

from workers.errors import UserError
from workers.model_source import ModelSource, SourceKind, repository_hint


@pytest.mark.parametrize(
    ("text", "kind", "name", "written"),
    [
        ("/models/maverick", SourceKind.LOCAL, "maverick", "/models/maverick"),
        ("models/scout/", SourceKind.LOCAL, "scout", "models/scout/"),
        ("hf://meta-llama/Llama-4-Scout", SourceKind.HUB, "Llama-4-Scout", "hf://meta-llama/Llama-4-Scout"),
        ("hf://models/a/b", SourceKind.HUB, "b", "hf://a/b"),
        ("HF://a/b/", SourceKind.HUB, "b", "hf://a/b"),
        ("hf://a/b@v1.0", SourceKind.HUB, "b", "hf://a/b@v1.0"),
        ("hf://a/b@refs/pr/3", SourceKind.HUB, "b", "hf://a/b@refs/pr/3"),
        ("hf://a/b@feature%2Fx", SourceKind.HUB, "b", "hf://a/b@feature/x"),
        ("s3://bucket/models/scout/", SourceKind.URL, "scout", "s3://bucket/models/scout"),
        ("gs://bucket", SourceKind.URL, "bucket", "gs://bucket"),
        ("https://host:8443/a%20b", SourceKind.URL, "a b", "https://host:8443/a%20b"),
        ("file:///mnt/models/x", SourceKind.URL, "x", "file:///mnt/models/x"),
    ],
)
def test_names(text: str, kind: SourceKind, name: str, written: str) -> None:
    source = ModelSource.parse(text)
    assert (source.kind, source.name, str(source)) == (kind, name, written)
    assert ModelSource.parse(str(source)) == source
    assert source.is_local == (kind == SourceKind.LOCAL)


def test_a_local_folder_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert ModelSource.parse("a/b").path == tmp_path / "a/b"
    assert ModelSource.parse("~/x").path == Path("/home/me/x")
    assert ModelSource.of(Path("hf:odd")).path == tmp_path / "hf:odd"


def test_revisions() -> None:
    source = ModelSource.parse("hf://a/b")
    assert (source.revision, source.ref, source.is_pinned) == ("", "main", False)
    pinned = source.at("0123456789" * 4)
    assert pinned.is_pinned
    assert str(pinned) == f"hf://a/b@{'0123456789' * 4}"
    url = ModelSource.parse("s3://b/x")
    assert (url.ref, url.is_pinned, url.at("x")) == ("", False, url)


def test_what_needs_a_network() -> None:
    needs = {text: ModelSource.parse(text).needs_network for text in ("/m", "file:///m", "hf://a/b", "s3://b/m")}
    assert needs == {"/m": False, "file:///m": False, "hf://a/b": True, "s3://b/m": True}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must not be empty"),
        ("hf:a/b", "did you mean hf://a/b?"),
        ("hf:/a/b", "did you mean hf://a/b?"),
        ("s3:/bucket/x", "did you mean s3://bucket/x?"),
        ("https:/host/x", "did you mean https://host/x?"),
        ("huggingface.co/a/b", "did you mean hf://a/b?"),
        ("https://huggingface.co/a/b/tree/main", "did you mean hf://a/b?"),
        ("https://hf.co/", "write hf://ORG/NAME"),
        ("hf://gpt2", "without its organisation; write hf://ORG/NAME"),
        ("hf://", "is no repository"),
        ("hf://a/b/c", "did you mean hf://a/b?"),
        ("hf://datasets/a/b", "of its datasets"),
        ("hf://a/b@", "where a revision should follow"),
        ("hf://a/b@x y", "cannot be a revision"),
        ("hf://a/..", "is no repository"),
        ("s3://key:secret@bucket/x", "must not hold a user's name or password"),
        ("https://host/x?token=1", "is followed by ? or #"),
        ("s3://", "names no folder"),
        ("file://mnt/models", "write file:///mnt/models"),
        ("https://[::1", "is no URL"),
    ],
)
def test_what_cannot_be_one(text: str, says: str) -> None:
    with pytest.raises(UserError, match=r"^model: ") as caught:
        ModelSource.parse(text)
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_hint() -> None:
    hint = "; for the Hugging Face hub write hf://meta-llama/Scout"
    assert repository_hint(ModelSource.parse("meta-llama/Scout").path) == hint
    assert repository_hint(Path("/a/b")) == repository_hint(Path("a").absolute()) == ""
