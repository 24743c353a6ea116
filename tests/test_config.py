"""domain.toml: every mistake is named, all at once, with its neighbours; every key is read by code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domains.config import DomainConfig, parse_config
from domains.describe import describe
from domains.domain import available_domains, find_domain, load_domain
from domains.errors import ConfigError

ROOT = Path(__file__).parent.parent
MINIMAL = '[domain]\nname = "x1"\ntitle = "X"\n[corpus]\ndocuments = "docs"\n'


def test_minimal_config_has_defaults() -> None:
    config = parse_config(MINIMAL, origin="here")
    assert config.train.method == "qlora"
    assert config.export.serve == "Q8_0"


def test_all_mistakes_are_named_at_once_with_their_neighbours() -> None:
    text = MINIMAL + '[train]\nlearnig_rate = 1\nrank = 0\n[retreive]\ntop_k = 3\n[exam]\nseed = "x"\n'
    with pytest.raises(ConfigError) as caught:
        parse_config(text, origin="my/domain.toml")
    message = str(caught.value)
    assert "my/domain.toml: 4 problems" in message
    assert "did you mean 'learning_rate'?" in message
    assert "did you mean 'retrieve'?" in message
    assert "train.rank = 0" in message
    assert "exam.seed = 'x'" in message


def test_profile_overrides_only_what_it_names() -> None:
    text = MINIMAL + "[train]\nepochs = 5\nrank = 8\n[profiles.quick.train]\nepochs = 1\n"
    quick = parse_config(text, origin="x", profile="quick")
    full = parse_config(text, origin="x", profile="full")
    assert (quick.train.epochs, quick.train.rank) == (1, 8)
    assert (full.train.epochs, full.train.rank) == (5, 8)


def test_a_mistake_in_an_unused_profile_is_found() -> None:
    text = MINIMAL + "[profiles.other.train]\nepochz = 1\n"
    with pytest.raises(
        ConfigError, match=r"profile 'other': train\.epochz: unknown key; did you mean 'epochs'"
    ):
        parse_config(text, origin="x", profile="full")


def test_unknown_profile_names_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"profile 'fast'[\s\S]*full"):
        parse_config(MINIMAL, origin="x", profile="fast")


def test_broken_toml_is_an_error_of_ours() -> None:
    with pytest.raises(ConfigError, match="not valid TOML"):
        parse_config("[domain\n", origin="x")


@given(st.text())
def test_any_text_parses_or_raises_config_error(text: str) -> None:
    try:
        parse_config(text, origin="x")
    except ConfigError:
        return
    raise AssertionError("no text without [domain] and [corpus] is a config")


@pytest.mark.parametrize("name", ["medical", "product_requirements"])
@pytest.mark.parametrize("profile", ["quick", "full"])
def test_shipped_domains_load_in_both_profiles(name: str, profile: str) -> None:
    domain = load_domain(name, profile=profile)
    assert domain.documents.is_dir()
    assert domain.questions is not None
    assert domain.questions.is_file()
    assert domain.config.domain.abstain in domain.prompts["system"]


def test_unknown_domain_names_the_neighbour() -> None:
    assert {"medical", "product_requirements"} <= set(available_domains())
    with pytest.raises(ConfigError, match="Did you mean 'medical'"):
        find_domain("medcal")


def test_a_path_works_wherever_a_name_does() -> None:
    assert find_domain(str(ROOT / "domains" / "medical")) == find_domain("medical")


def test_every_config_key_is_read_by_code() -> None:
    """A key that nothing reads is a lie: look for an attribute chain ending in .<section>.<key>."""
    chains = set()
    sources = [
        path for folder in ("domains", "rag", "serve", "pipeline") for path in (ROOT / folder).rglob("*.py")
    ]
    for path in [*sources, ROOT / "preceptor.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                below = node.value
                owner = below.attr if isinstance(below, ast.Attribute) else getattr(below, "id", "")
                chains.add((owner, node.attr))
    unread = [
        f"{section}.{key}"
        for section, field in DomainConfig.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
        if (section, key) not in chains
    ]
    assert unread == []


def test_the_configuration_page_is_the_code() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == describe(), "run: python -m domains.describe > docs/configuration.md"
