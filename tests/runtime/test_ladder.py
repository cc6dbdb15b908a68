"""The rungs of `--low-memory`: their names, what each asks of a GPU's libraries, and how users give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from uc3d_rt.backends.onnxruntime import provider_options
from uc3d_rt.cli import with_rungs
from uc3d_rt.errors import UsageError
from uc3d_rt.ladder import LADDER, LEAST, OFF, STAGES, UNET, lower_rungs, rung_of
from uc3d_rt.pipeline import Pipeline

Run = Callable[..., tuple[int, str, str]]


def test_each_rung_adds_to_the_one_before() -> None:
    def asks(rung: object) -> set[str]:
        return {name for name, value in vars(rung).items() if value is True}

    assert LADDER == (OFF, STAGES, UNET, LEAST) and asks(OFF) == set()
    for upper, lower in zip(LADDER, LADDER[1:], strict=False):
        assert asks(upper) < asks(lower)


def test_a_rung_by_its_name() -> None:
    assert [rung_of(rung.name) for rung in LADDER] == list(LADDER)
    assert (rung_of(True), rung_of(False), rung_of(LEAST)) == (UNET, OFF, LEAST)  # as before there were rungs
    for unknown in ("", "low", "1"):
        with pytest.raises(UsageError, match=f"unknown rung '{unknown}'.*off, stages, unet, least"):
            rung_of(unknown)


def test_the_way_down() -> None:
    assert lower_rungs(OFF) == "use --low-memory stages or, for less still, unet or least"
    assert lower_rungs(UNET) == "use --low-memory least" and lower_rungs(LEAST) == ""


def test_what_a_provider_is_asked_for() -> None:
    fast = {"cudnn_conv_algo_search": "EXHAUSTIVE", "use_tf32": "0"}
    found = [provider_options("cuda:1", fast, rung) for rung in LADDER]
    assert found[0] == fast
    assert found[1] == found[2] == fast | {"arena_extend_strategy": "kSameAsRequested"}
    assert found[3]["cudnn_conv_algo_search"] == "HEURISTIC" and found[3]["use_tf32"] == "0"
    assert found[3]["cudnn_conv_algo_search"] == "HEURISTIC"
    assert provider_options("cpu", fast, LEAST) == {}


@pytest.mark.parametrize(
    "given, expected",
    [
        (["a.png", "--low-memory"], ["a.png", "--low-memory=unet"]),
        (["--low-memory", "a.png"], ["--low-memory=unet", "a.png"]),
        (["--low-memory", "--quiet"], ["--low-memory=unet", "--quiet"]),
        (["--low-memory", "least", "a.png"], ["--low-memory", "least", "a.png"]),
        (["--low-memory=stages", "a.png"], ["--low-memory=stages", "a.png"]),
        (["a.png"], ["a.png"]),
        ([], []),
    ],
)
def test_the_option_alone_is_what_it_was(given: list[str], expected: list[str]) -> None:
    assert with_rungs(given) == expected


@pytest.mark.parametrize(
    "given, rung",
    [((), "off"), (("--low-memory",), "unet"), (("--low-memory", "least"), "least")],
)
def test_the_rung_reaches_the_backend(
    run_cli: Run, object_png: Path, tiny_bundle: Path, tmp_path: Path, given: tuple[str, ...], rung: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[str] = []

    def told(self: Pipeline, *_: object, **__: object) -> None:
        seen.append(self._backend.low_memory.name)
        raise UsageError("enough")

    monkeypatch.setattr(Pipeline, "views", told)
    code, _, err = run_cli(*given, object_png, "-o", tmp_path / "m.glb", "--bundle", tiny_bundle)
    assert (code, err, seen) == (2, "error: enough\n", [rung])


def test_a_rung_that_is_none(run_cli: Run, object_png: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    code, _, err = run_cli(object_png, "-o", tmp_path / "m.glb", "--low-memory=most")
    assert code == 2 and "'off', 'stages', 'unet', 'least'" in err
    with pytest.raises(UsageError, match="unknown rung 'most'"):
        Pipeline.from_bundle(tiny_bundle, low_memory="most")
