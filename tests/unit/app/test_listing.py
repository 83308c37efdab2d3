"""`cl-list` says of each option what its file says, without importing it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from checkout import ROOT
from cl.app import listing
from cl.app.cards import card
from cl.data.task import SCENARIOS
from cl.errors import InputError


def test_a_strategys_line_is_the_first_paragraph_of_its_docstring() -> None:
    listed = listing.options("strategy")
    assert set(listed) == {path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml")}
    for name, said in listed.items():
        doc = importlib.import_module(f"cl.strategies.{name}").__doc__
        assert doc is not None and said == " ".join(doc.partition("\n\n")[0].split())


@pytest.mark.parametrize("group", listing.groups())
def test_every_option_has_a_line_of_its_own(group: str) -> None:
    listed = listing.options(group)
    assert set(listed) == {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
    assert all(said[:1].isalpha() for said in listed.values()), listed
    assert len(set(listed.values())) == len(listed)


def test_installed_packages_are_listed_and_replace_nothing(tmp_path, monkeypatch) -> None:
    for name, text in {
        "mine/__init__.py": "",
        "mine/stream.py": '"""Mine."""\n\ndef a(): pass\n\ndef b():\n    """Blobs that\n    move."""\n',
        "mine/conf/__init__.py": "",
        "mine/conf/stream/blobs.yaml": "_target_: mine.stream.b\n",
        "mine/conf/stream/split.yaml": "# Not ours.\n_target_: mine.stream.a\n",
        "mine/conf/stream/lost.yaml": "_target_: nobodys.stream.a\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(listing, "entry_points", lambda group: [EntryPoint("mine", "mine.conf", group)])
    before = listing.options("strategy")
    listed = listing.options("stream")
    assert listed["blobs"] == "Blobs that move." and listed["lost"] == ""
    assert "Not ours." not in listed.values() and "split" in listed
    assert listing.options("strategy") == before
    assert "mine.stream" not in sys.modules


def test_the_command(capsys) -> None:
    listing.main(["scenario", "dataset"])
    said = " ".join(capsys.readouterr().out.split())
    assert "scenario=class Class-incremental" in said and "'clsim[huggingface]'" in said
    listing.main([])
    said = capsys.readouterr().out
    assert "strategy=gpm" in said and "stream=permuted" in said and "scenario=" not in said
    with pytest.raises(SystemExit):
        listing.main(["strategies"])
    assert "no group called 'strategies': did you mean 'strategy'" in capsys.readouterr().err
    with pytest.raises(InputError, match="Known: backbone"):
        listing.options("strategies")


def test_the_help_of_the_command(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        listing.main(["--help"])
    assert ended.value.code == 0 and "condition=value" in capsys.readouterr().out


def test_a_card_read_from_the_source_is_what_the_class_says() -> None:
    for name, found in listing.cards().items():
        module = importlib.import_module(f"cl.strategies.{name}")
        kind = next(
            kind for kind in vars(module).values() if getattr(kind, "__name__", "").lower() == name.replace("_", "")
        )
        for attribute in ("scenarios", "targets", "needs", "bound"):
            assert found[attribute] == getattr(kind, attribute), (name, attribute)


def test_a_card_of_an_installed_package_is_read_however_it_imports_the_contract(tmp_path, monkeypatch) -> None:
    (tmp_path / "theirs.py").write_text(
        "import cl\nimport cl as c\nfrom cl import Strategy\nfrom cl.toolkit.subspace import ScaledByTask as Base\n"
        "class A(Strategy):\n    needs = ('memory',)\n"
        "class B(cl.Strategy):\n    scenarios: tuple = ('domain',)\n"
        "class C(c.Strategy, object):\n    bound = 'up' + 'per'\n"
        "class D(Base):\n    targets = ('label',)\n"
        "class E(Nowhere):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = {name: card(f"theirs.{name}") for name in "ABCDE"}
    assert [found[name]["scenarios"] for name in "ABCD"] == [SCENARIOS, ("domain",), SCENARIOS, ("task",)]
    assert found["A"]["needs"] == ("memory",) and found["C"]["bound"] == "" and found["E"] == {}
    assert found["D"]["targets"] == ("label",) and found["D"]["needs"] == ("boundaries", "sgd")
    assert "theirs" not in sys.modules


def test_conditions_choose_among_strategies(capsys) -> None:
    def told(*words: str) -> set[str]:
        listing.main(list(words))
        return set(re.findall(r"strategy=(\w+)", capsys.readouterr().out))

    assert told("bound=upper") == {"joint", "cumulative"} and told("strategy", "bound=lower") == {"finetune"}
    assert {"hat", "packnet", "trgp"} <= told("scenario=task") - told("scenario=class")
    assert "icarl" not in told("scenario=domain") and "icarl" in told("scenario=class", "memory=yes")
    assert told("memory=yes") | told("memory=no") == set(listing.options("strategy"))
    assert "er" in told("target=multilabel", "transformer=no") and "l2p" in told("transformer=yes")
    for words, message in {
        (
            "colour=red",
        ): "no condition on strategies called 'colour'. Known: batch_norm, bound, boundaries, memory, scenario",
        ("scenario=blue",): "scenario=blue chooses nothing: scenario is one of class, domain, task.",
        ("bound=upper", "memory=yes"): "No strategy meets all of bound=upper memory=yes: leave one of them out.",
        ("stream", "memory=no"): "memory=no chooses among strategies: list the group stream without it.",
    }.items():
        with pytest.raises(SystemExit):
            listing.main(list(words))
        assert message in capsys.readouterr().err


def test_the_command_imports_no_torch() -> None:
    code = "import sys; from cl.app.listing import main; main(['scenario=class']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_settings_are_listed_with_what_each_means() -> None:
    listed = listing.options("settings")
    assert listed["seed"] and listed["checkpoint.keep"] and all(listed.values())
    with pytest.raises(InputError, match="settings"):
        listing.options("seting")
