"""The parsers hold for what the fuzzer begins with, and for what hypothesis makes of it. `make fuzz` looks longer."""

from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzzing import SEEDS, TARGETS

_PIECE: Final = st.binary(max_size=20) | st.sampled_from([b"", b".", b"\n", b'"', b"{", b"\x00", b"0", b"\xef\xbc\x91"])


@pytest.mark.parametrize("target", TARGETS)
def test_seeds(target: str) -> None:
    """What the fuzzer begins with breaks nothing."""
    for data in SEEDS[target]:
        TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_changed_seeds(target: str, data: st.DataObject) -> None:
    """Nor does any of them when some of it is replaced, or anything else."""
    seed = data.draw(st.sampled_from(SEEDS[target]))
    start = data.draw(st.integers(0, len(seed)))
    end = data.draw(st.integers(start, min(len(seed), start + 10)))
    TARGETS[target](seed[:start] + data.draw(_PIECE) + seed[end:])


def test_the_targets_can_fail() -> None:
    """Each kind of seed reaches what is behind its parser: not everything is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.fuzzing.encode", lambda *_, **__: b"something else")
        with pytest.raises(AssertionError):
            TARGETS["entry"](SEEDS["entry"][0])
    behind = (
        ("user_id", "UUID", 0),
        ("token", "_encoded", 0),
        ("claims", "json.loads", 0),
        ("key_set", "len", 0),
        ("headers", "ip_address", 0),
        ("body", "isinstance", 0),
        ("body", "isinstance", 1),
    )
    assert {"entry", *(target for target, _, _ in behind)} == TARGETS.keys()
    for target, name, seed in behind:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"tests.fuzzing.{name}", _refuse, raising=False)
            with pytest.raises(LookupError):
                TARGETS[target](SEEDS[target][seed])


def _refuse(*_: object) -> object:
    raise LookupError
