"""The registry of methods: what it finds, what it does not let spoil the rest, and the options of each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import fedlora.methods
from fedlora.config import Config, MethodSection, load_config, unused_keys
from fedlora.errors import InputError
from fedlora.methods import Method, broken_methods, forget_methods, get_method, methods
from tests.configs import BASE
from tests.packages import lay_package

METHOD = """
from pydantic import Field
from fedlora.config import MethodSection
from fedlora.methods import Method

class Options(MethodSection):
    speed: int = Field(default=3, ge=1, description="Speed.")
    init: str = Field(default="cold", description="Temperature.")

class Base(Method):
    Options = Options
    learning_rates = {{"adamw": 1e-3, "sgd": 0.1}}

class Named(Base):
    name, title, paper = "{name}", "A method", "none"
"""


@pytest.fixture
def anew() -> Iterator[None]:
    """Look for methods anew, before and after."""
    forget_methods()
    yield
    forget_methods()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None) -> Path:
    """A package in place of the built-in one, on the path."""
    folder = tmp_path / "made_up_methods"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(fedlora.methods, "BUILT_IN", folder.name)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == folder.name]:
        del sys.modules[name]


def install(folder: Path, module: str, points: dict[str, str], code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package with methods on the path."""
    lay_package(folder, module, {"fedlora.methods": points}, code)
    monkeypatch.syspath_prepend(str(folder))
    forget_methods()


def test_a_file_or_a_folder_adds_a_method(package: Path) -> None:
    (package / "one.py").write_text(METHOD.format(name="one"))
    (package / "large").mkdir()
    (package / "large" / "__init__.py").write_text("from made_up_methods.large.server import Named\n")
    (package / "large" / "server.py").write_text(METHOD.format(name="large"))
    (package / "elsewhere.py").write_text(METHOD.format(name="two-words"))
    assert get_method("one").__module__ == "made_up_methods.one"
    assert get_method("large").__module__ == "made_up_methods.large.server"
    assert get_method("two-words").__module__ == "made_up_methods.elsewhere"
    assert list(methods()) == ["large", "one", "two-words"]


def test_a_file_that_cannot_be_imported_spoils_no_other(package: Path) -> None:
    (package / "one.py").write_text(METHOD.format(name="one"))
    (package / "two.py").write_text("import no_such_module\n")
    assert set(methods()) == {"one"}
    assert "no_such_module" in broken_methods()["made_up_methods.two"]
    with pytest.raises(InputError, match="no_such_module"):
        get_method("two")


def test_a_name_that_is_taken_twice_names_both(package: Path) -> None:
    (package / "one.py").write_text(METHOD.format(name="one"))
    (package / "two.py").write_text(METHOD.format(name="two"))
    (package / "three.py").write_text(METHOD.format(name="two"))
    with pytest.raises(InputError, match=r"made_up_methods\.three:Named and made_up_methods\.two:Named"):
        methods()
    assert get_method("one").name == "one"


def test_options_check_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None) -> None:
    code = METHOD.format(name="outside").replace(
        "class Base(",
        """
    def check(self, config):
        from fedlora.errors import InputError
        if self.speed > config.run.rounds:
            raise InputError("method.speed", self.speed, "is above run.rounds; lower it")

class Base(""",
    )
    install(tmp_path, "outside_checked", {"outside": "outside_checked:Named"}, code, monkeypatch)
    assert load_config(BASE, {"method.name": "outside"}).method.name == "outside"
    with pytest.raises(InputError, match=r"method\.speed.*above run\.rounds"):
        load_config(BASE, {"method.name": "outside", "method.speed": 11})


def test_an_entry_point_adds_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None) -> None:
    install(tmp_path, "outside_one", {"outside": "outside_one:Named"}, METHOD.format(name="outside"), monkeypatch)
    assert "outside" in methods()
    values = {"method.name": "outside", "method.speed": 7}
    config = load_config(BASE, values)
    assert config.method.speed == 7  # type: ignore[attr-defined]
    assert Config.from_toml(config.to_toml()) == config
    with pytest.raises(InputError, match="did you mean speed"):
        load_config(BASE, {"method.name": "outside", "method.sped": 7})
    assert unused_keys(load_config(BASE, {"method.speed": 7})) == [
        "method.speed is not used: it is a key of outside, not of fedit"
    ]
    # Two methods have init; the value must suit one of them.
    assert "fed-sb and outside" in unused_keys(load_config(BASE, {"method.init": "warm"}))[0]


@pytest.mark.parametrize(
    ("value", "code", "why"),
    [
        ("outside_two:Named", "import no_such_module", "no_such_module"),
        ("outside_two:Absent", METHOD.format(name="outside"), "Absent"),
        ("outside_two:Options", METHOD.format(name="outside"), "no subclass"),
        ("outside_two:Named", METHOD.format(name="inside"), "inside"),
        ("outside_two:Base", METHOD.format(name="inside"), "None"),
    ],
)
def test_a_broken_entry_point_is_told_when_its_name_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None, value: str, code: str, why: str
) -> None:
    before = methods()
    monkeypatch.delitem(sys.modules, "outside_two", raising=False)
    install(tmp_path, "outside_two", {"outside": value}, code, monkeypatch)
    assert methods() == before
    assert load_config(BASE).method.name == "fedit"
    with pytest.raises(InputError, match=why) as caught:
        load_config(BASE, {"method.name": "outside"})
    assert caught.value.field == "method.name"
    assert value in str(caught.value)
    monkeypatch.delitem(sys.modules, "outside_two", raising=False)


def test_an_entry_point_cannot_take_a_built_in_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None
) -> None:
    install(tmp_path, "outside_three", {"fedit": "outside_three:Named"}, METHOD.format(name="fedit"), monkeypatch)
    with pytest.raises(InputError, match="outside_three:Named"):
        load_config(BASE)
    assert load_config(BASE, {"method.name": "ffa-lora"}).method.name == "ffa-lora"


def test_a_method_that_cannot_train_privately_is_refused_under_privacy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None
) -> None:
    code = METHOD.format(name="open") + "    dp = False\n"
    install(tmp_path, "outside_four", {"open": "outside_four:Named"}, code, monkeypatch)
    load_config(BASE, {"method.name": "open"})
    with pytest.raises(InputError, match=r"privacy\.mode"):
        load_config(BASE, {"method.name": "open", "privacy.mode": "example", "privacy.target_epsilon": 1.0})


def test_keys_of_other_methods_are_noted_and_left_out() -> None:
    config = load_config(BASE, {"method.init": "public", "method.ranks": [1]})
    assert [note.split()[0] for note in unused_keys(config)] == ["method.init", "method.ranks"]
    assert "init" not in config.to_toml()
    again = unused_keys(load_config(config.to_toml()))
    assert not any(note.startswith("method.") for note in again)
    with pytest.raises(InputError, match=r"method\.init"):
        load_config(BASE, {"method.init": "cold"})


def test_what_a_run_left_is_read_without_its_method() -> None:
    text = load_config(BASE).to_toml().replace('"fedit"', '"elsewhere"')
    text = text.replace("dropout = 0.0\n", "dropout = 0.0\nspeed = 7\n")
    config = Config.from_toml(text)
    assert config.method.model_dump()["speed"] == 7
    assert config.to_toml() == text
    with pytest.raises(InputError, match="is not a method"):
        load_config(text)


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield a section and those within it."""
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation)


@pytest.mark.parametrize(
    "section",
    [s for s in sections(Config) if s is not Config] + [m.Options for m in methods().values()],
    ids=lambda section: section.__name__,
)
def test_every_key_is_described(section: type[BaseModel]) -> None:
    for name, field in section.model_fields.items():
        described = (field.description or "").strip()
        assert described.endswith("."), f"{section.__name__}.{name} has no description"
        assert len(described.split()) > 1


@pytest.mark.parametrize("method", methods().values(), ids=lambda method: method.name)
def test_every_method_says_what_it_is(method: Any) -> None:
    assert method.title
    assert method.paper
    assert set(method.learning_rates) == {"adamw", "sgd"}
    assert issubclass(method.Options, MethodSection)
    assert {"exact", "mixed_ranks", "dp"} <= set(vars(Method))
    assert all(isinstance(flag, bool) for flag in (method.exact, method.mixed_ranks, method.dp))


def test_the_app_of_a_node_loads_neither_torch_nor_a_method() -> None:
    loaded = "sorted({'torch', 'fedlora.strategies', 'fedlora.methods'} & set(sys.modules))"
    script = f"import sys, fedlora.clients.node_app; print({loaded})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
