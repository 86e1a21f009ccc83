"""The settings file: sections, defaults, and values that make no sense."""

from pathlib import Path

import pytest

from placer.config import Settings, load_settings
from placer.core.errors import InputFileError, UsageError


def load(tmp_path: Path, content: str) -> Settings:
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    return load_settings(path)


def test_no_file_and_an_empty_file_give_the_defaults(tmp_path: Path) -> None:
    assert load_settings(None) == Settings()
    for content in ("", "# nothing", "{}", "profile: {}\nsolve: {}\nrun: {}"):
        assert load(tmp_path, content) == Settings()


def test_each_section_and_key_is_read(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        "profile: {window_tokens: 7, folds: 3, max_sets_per_layer: 11}\n"
        "solve: {replica_choice: token_hash, batch_tokens: 99}\n"
        "run: {hidden_size: 8, moe_intermediate_size: 4, tokens_per_iteration: 16, iterations: 2, warmup: 0,\n"
        "      dtype: bfloat16, timeout_s: 1.5}\n",
    )
    assert (settings.profile.window_tokens, settings.profile.folds, settings.profile.max_sets_per_layer) == (7, 3, 11)
    assert (settings.solve.replica_choice, settings.solve.batch_tokens) == ("token_hash", 99)
    assert (settings.run.hidden_size, settings.run.moe_intermediate_size, settings.run.warmup) == (8, 4, 0)
    assert (settings.run.tokens_per_iteration, settings.run.iterations) == (16, 2)
    assert (settings.run.dtype, settings.run.timeout_s) == ("bfloat16", 1.5)


def test_a_key_left_out_keeps_its_default(tmp_path: Path) -> None:
    settings = load(tmp_path, "profile: {folds: 3}")
    assert settings.profile.window_tokens == Settings().profile.window_tokens
    assert settings.run == Settings().run


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("profiles: {}", "unknown key 'profiles'; did you mean 'profile'?"),
        ("profile: {window_token: 3}", "unknown key 'profile.window_token'; did you mean 'window_tokens'?"),
        ("solve: {batch: 3}", "unknown key 'solve.batch'; did you mean 'batch_tokens'?"),
        ("run: {timeout: 3}", "unknown key 'run.timeout'; did you mean 'timeout_s'?"),
        ("window_tokens: 3", "unknown key 'window_tokens'"),
        ("profile: 3", "profile must be a mapping"),
        ("profile: [window_tokens]", "profile must be a mapping"),
        ("profile: null", "profile"),
        ("[]", "the file must be a mapping"),
        ("0", "the file must be a mapping"),
        ("false", "the file must be a mapping"),
        ("profile: {window_tokens: many}", "profile.window_tokens"),
        ("profile: {window_tokens: 1.5}", "profile.window_tokens"),
        ("profile: {window_tokens: true}", "profile.window_tokens"),
        ("profile: {window_tokens: 0}", "profile.window_tokens is 0"),
        ("profile: {folds: -1}", "profile.folds is -1"),
        ("profile: {max_sets_per_layer: 0}", "profile.max_sets_per_layer is 0"),
        ("solve: {replica_choice: best}", "solve.replica_choice"),
        ("solve: {batch_tokens: 0}", "solve.batch_tokens is 0"),
        ("solve: {batch_tokens: .nan}", "solve.batch_tokens"),
        ("run: {hidden_size: 0}", "run.hidden_size is 0"),
        ("run: {moe_intermediate_size: -1}", "run.moe_intermediate_size is -1"),
        ("run: {tokens_per_iteration: 0}", "run.tokens_per_iteration is 0"),
        ("run: {iterations: 0}", "run.iterations is 0"),
        ("run: {warmup: -1}", "run.warmup is -1"),
        ("run: {timeout_s: 0}", "run.timeout_s is 0"),
        ("run: {timeout_s: .nan}", "run.timeout_s is nan"),
        ("run: {timeout_s: .inf}", "run.timeout_s is inf"),
        ("run: {dtype: float64}", "run.dtype"),
    ],
)
def test_what_makes_no_sense_is_named(content: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputFileError) as caught:
        load(tmp_path, content)
    message = str(caught.value)
    assert text in message
    assert "settings.yaml" in message
    assert "\n" not in message


def test_settings_made_in_python_are_checked_as_well() -> None:
    from placer.config.settings import ProfileSettings, RunSettings, SolveSettings

    for make in (
        lambda: ProfileSettings(window_tokens=0),
        lambda: SolveSettings(batch_tokens=-5),
        lambda: RunSettings(iterations=0),
    ):
        with pytest.raises(UsageError, match="give"):
            make()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="cannot be read"):
        load_settings(tmp_path / "nowhere.yaml")
