"""What [train] method allows, what it completes, and what is said where settings contradict each other."""

from __future__ import annotations

import tomllib

import pytest

from domains.config import DomainConfig, parse_config
from domains.errors import ConfigError
from domains.routes import GRIDS, LEARNING_RATES
from pipeline.bundle import dump_toml
from pipeline.methods.registry import method_of

MINIMAL = '[domain]\nname = "x1"\ntitle = "X"\n[corpus]\ndocuments = "docs"\n'


def config(text: str, profile: str | None = None) -> DomainConfig:
    return parse_config(MINIMAL + text, origin="here", profile=profile)


@pytest.mark.parametrize("method", GRIDS)
def test_a_method_brings_its_grid_rate_and_format(method: str) -> None:
    found = config(f'[train]\nmethod = "{method}"\n')
    assert found.train.learning_rate == LEARNING_RATES[method]
    if not GRIDS[method]:
        assert (found.train.grid, found.export.serve) == (None, "Q8_0")
        return
    assert found.train.grid == GRIDS[method][0] == found.export.serve
    assert found.export.formats == [found.train.grid]


def test_every_allowed_pair_is_a_method() -> None:
    for method, grids in GRIDS.items():
        for grid in grids or (None,):
            assert method_of(method, grid)


def test_what_is_written_counts() -> None:
    found = config(
        '[train]\nmethod = "qalora"\ngrid = "Q4_0"\nlearning_rate = 0.5\n[export]\nformats = ["Q8_0"]\n'
    )
    assert (found.train.grid, found.train.learning_rate) == ("Q4_0", 0.5)
    assert (found.export.formats, found.export.serve) == (["Q8_0"], "Q4_0")


def test_a_resolved_file_is_read_back_the_same() -> None:
    for method in GRIDS:
        found = config(f'[train]\nmethod = "{method}"\n')
        text = dump_toml(found.model_dump())
        assert parse_config(text, origin="bundle") == found
        assert ("grid" in tomllib.loads(text)["train"]) == bool(GRIDS[method])


def test_a_profile_may_choose_another_method() -> None:
    text = '[train]\nmethod = "qat"\n[profiles.quick.train]\nmethod = "qlora"\n'
    assert config(text).export.serve == "Q4_0"
    assert config(text, profile="quick").export.serve == "Q8_0"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '[train]\nmethod = "qat"\n[export]\nserve = "Q8_0"\n',
            r"export\.serve = 'Q8_0': .*serve = \"Q4_0\"",
        ),
        ('[train]\nmethod = "qat"\ngrid = "Q8_0"\n', r"train\.grid = 'Q8_0': .*'Q4_0' or 'Q4_1'"),
        ('[train]\ngrid = "Q4_0"\n', r"train\.grid = 'Q4_0': .*NF4"),
        ('[train]\nmethod = "qalora"\ndropout = 0.1\n', r"train\.dropout = 0\.1: .*dropout = 0"),
        (
            '[train]\nmethod = "grid-lora"\n[reflect]\nbackend = "tokens"\n',
            r"'grid-lora': .*method = \"qlora\" does",
        ),
        ('[train]\nmethod = "qat"\nbase_rounding = "gptq"\n', r"base_rounding = 'gptq': .*\"qalora\""),
        ('[train]\nbase_rounding = "gptq"\n', r"base_rounding = 'gptq': .*\"grid-lora\""),
        ("[train]\nkl_weight = 2.0\n", r"train\.kl_weight = 2\.0: .*\"ce\+kl\""),
        ("[train]\nkl_temperature = 2.0\n", r"train\.kl_temperature = 2\.0: .*\"ce\+kl\""),
        ('[train]\nkl_teacher = "x"\n', r"train\.kl_teacher = 'x': .*\"ce\+kl\""),
        (
            '[curate]\nevidence = "rationale"\n[reflect]\nbackend = "tokens"\n',
            r"curate\.evidence = 'rationale': .*'tokens'",
        ),
        (
            '[curate]\nretrieved_share = 0.5\n[reflect]\nbackend = "text"\n',
            r"curate\.retrieved_share = 0\.5: .*'text'",
        ),
        (
            '[reflect]\nbackend = "tokens"\ndistracting = "answer"\n',
            r"reflect\.distracting = 'answer': .*\"text\" or \"grader\"",
        ),
        (
            '[reflect]\nbackend = "text"\nform = "long"\n',
            r"reflect\.form = 'long': backend = 'text' .*\"tokens\"",
        ),
        ('[reflect]\nbackend = "text"\njudge = "endpoint"\n', r"reflect\.judge = 'endpoint': .*\"grader\""),
        ('[reflect]\nbackend = "grader"\nthreshold = 0.7\n', r"reflect\.threshold = 0\.7: .*\"tokens\""),
        ('[reflect]\nbackend = "text"\nbeam = 3\n', r"reflect\.beam = 3: .*\"tokens\""),
        (
            '[reflect]\nbackend = "text"\ndrop_unsupported = false\n',
            r"reflect\.drop_unsupported = False: .*\"tokens\" or \"grader\"",
        ),
        ('[reflect]\nbackend = "grader"\n[serve]\nvotes = 5\n', r"serve\.votes = 5: .*\"none\""),
        (
            '[reflect]\nbackend = "tokens"\ndrafts = "explained"\n[curate]\nrationale_in_target = true\n',
            r"curate\.rationale_in_target = true: .*leave one of them out",
        ),
        (
            '[retrieve]\nlexical_weight = 0\n[serve]\noptions = "evidence"\n',
            r"serve\.options = 'evidence': .*\"student\"",
        ),
        ('[retrieve]\ntop_k = 4\n[reflect]\nbackend = "text"\n', r"retrieve\.top_k = 4: .*at most 3"),
        ('[elicit.judge]\ngguf = "x.gguf"\nmodel = "y"\n', r"elicit\.judge.*model = 'y' is an endpoint's"),
        ('[elicit.judge]\nkind = "local"\nbase_url = "y"\n', r"elicit\.judge.*beside kind = 'local'"),
        ('[elicit.judge]\nkind = "endpoint"\ngguf = "y"\n', r"elicit\.judge.*beside kind = 'endpoint'"),
        (
            '[reflect]\nbackend = "text"\ndrafts = "explained"\n',
            r"reflect\.drafts = 'explained': .*backend = \"tokens\"",
        ),
        ('[train]\nmethod = "lora"\n', r"train\.method = 'lora'"),
    ],
)
def test_contradictions_are_named_with_what_to_write(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(text)


def test_what_is_used_is_no_contradiction() -> None:
    used = '[train]\nobjective = "ce+kl"\nkl_weight = 2.0\nkl_temperature = 2.0\nkl_teacher = "x"\n'
    assert config(used).train.kl_teacher == "x"
    assert config('[curate]\nevidence = "rationale"\nretrieved_share = 0.1\n').curate.evidence == "rationale"
    for backend in ("text", "grader"):
        text = f'[reflect]\nbackend = "{backend}"\ndistracting = "answer"\n'
        assert config(text).reflect.distracting == "answer"
    sail = '[reflect]\nbackend = "tokens"\nform = "long"\nbeam = 4\n[profiles.a.reflect]\nbackend = "text"\n'
    assert config(sail, profile="a").reflect.beam == 4  # what a profile inherits may stand idle,
    with pytest.raises(ConfigError, match=r"profile 'a': reflect\.beam = 3"):  # what it sets may not
        config(sail + "beam = 3\n")
    off = '[reflect]\nbackend = "tokens"\nform = "long"\n[profiles.a.reflect]\nbackend = "none"\n'
    assert config(off).reflect.form == "long"  # and the profile may switch it off
    assert config('[reflect]\nbackend = "tokens"\ndrafts = "explained"\n').reflect.drafts == "explained"


def test_contradictions_stand_beside_other_mistakes_of_other_profiles() -> None:
    text = '[profiles.a.train]\nmethod = "qat"\ndropout = 0.2\n[profiles.b.train]\nrank = 0\n'
    with pytest.raises(ConfigError) as caught:
        config(text)
    assert "2 problems" in str(caught.value)
    assert "profile 'a': train.dropout" in str(caught.value)
