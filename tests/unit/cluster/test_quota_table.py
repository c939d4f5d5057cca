"""Quotas of single tenants, a table in the configuration file."""

from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.errors import UsageError


def load(folder: Path, table: str) -> dict[str, int]:
    file = folder / "caravan.toml"
    file.write_text(f'[serve]\nmodel = "{folder}"\n{table}\n')
    return load_config({}, file).router.tenant_tokens_per_minute


def test_quotas_of_tenants(tmp_path):
    assert load(tmp_path, "") == {}
    assert load(tmp_path, '[router.tenant_tokens_per_minute]\nfree = 600\n"big one" = 0') == {"free": 600, "big one": 0}


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("[router]\ntenant_tokens_per_minute = 5", "tenant_tokens_per_minute must be a table, got 5"),
        ("[router.tenant_tokens_per_minute]\na = 'x'", "tenant_tokens_per_minute.a must be a whole number, got 'x'"),
        ("[router.tenant_tokens_per_minute]\na = -1", "a: tokens a minute must be at least 0, got -1"),
    ],
)
def test_quotas_that_are_none(tmp_path, table, sentence):
    with pytest.raises(UsageError, match=sentence):
        load(tmp_path, table)
