"""Which release a library is: from its file alone, and never a guess."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rkboard.emulator import build as emulator
from rkruntime import folders
from rkruntime.abi import CALLABLE, EMULATED, LAYOUTS, RELEASES, abi_of, release_named
from rkruntime.bundle.manifest import open_bundle
from rkruntime.engine.loading import check_readable
from rkruntime.errors import LibraryError, RKEdgeError
from rkruntime.library.elf import read_elf
from rkruntime.library.identify import check_machine, identify, inspect_library

MakeLibrary = Callable[..., Path]


@pytest.fixture(scope="session")
def make_library(tmp_path_factory: pytest.TempPathFactory) -> MakeLibrary:
    """A shared library that exports names and carries texts, and does nothing."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")

    def make(texts: list[str], names: list[str], *options: str) -> Path:
        folder = tmp_path_factory.mktemp("library")
        source, library = folder / "library.c", folder / "librkllmrt.so"
        lines = [f'__attribute__((used)) static const char text{i}[] = "{text}";' for i, text in enumerate(texts)]
        lines += [f"int {name}(void) {{ return -1; }}" for name in names]
        source.write_text("\n".join(lines) + "\n")
        subprocess.run([compiler, "-shared", "-fPIC", *options, "-o", library, source], check=True)
        return library

    return make


def line(version: str) -> str:
    return f"RKLLM SDK (version: {version} | target: Linux | build: 27637c95 2025-05-02 17:46:07)"


def declared(version: str) -> list[str]:
    return list(abi_of(version).functions)


@pytest.mark.parametrize("version", EMULATED)
def test_emulated_libraries(version: str) -> None:
    identity = identify(emulator.build(version))
    assert identity.release is RELEASES[version]
    assert (identity.version, identity.bits, identity.machine) == (version, 64, os.uname().machine)
    assert identity.emulated
    assert not identity.forced
    assert identity.functions == set(abi_of(version).functions)


@pytest.mark.parametrize("version", CALLABLE)
@pytest.mark.parametrize("hash_style", ["gnu", "sysv", "both"])
def test_every_release(make_library: MakeLibrary, version: str, hash_style: str) -> None:
    if hash_style != "gnu" and version != CALLABLE[-1]:
        return
    library = make_library(
        [line(version)], [*declared(version), "rkllm_print_timings"], f"-Wl,--hash-style={hash_style}"
    )
    identity = identify(library)
    assert identity.release == RELEASES[version]
    assert not identity.emulated
    assert identity.version_line == line(version)
    assert identity.functions == set(declared(version))


@pytest.mark.parametrize("version", ["1.0.0", "1.0.1", "1.0.2b"])
def test_1_0_x_is_recognised_and_refused(make_library: MakeLibrary, version: str) -> None:
    library = make_library([line(version)], declared(version))
    assert inspect_library(library).version == version
    with pytest.raises(LibraryError, match=f"it is release {version}: .*by value"):
        identify(library)


def test_unknown_releases_are_refused_unless_named(make_library: MakeLibrary) -> None:
    library = make_library([line("1.9.0")], declared("1.3.0"))
    with pytest.raises(LibraryError, match=r"release 1\.9\.0, newer than 1\.3\.1") as caught:
        identify(library)
    assert "--release" in caught.value.hint
    forced = identify(library, "1.3.0")
    assert (forced.release, forced.forced, forced.version) == (RELEASES["1.3.0"], True, "1.9.0")
    with pytest.raises(LibraryError, match=r"not among those known up to 1\.3\.1"):
        identify(make_library([line("1.2.2b7")], declared("1.2.2")))
    # What the named release lacks or has too much is still a contradiction.
    with pytest.raises(LibraryError, match=r"exports rkllm_get_kv_cache_size, which came with 1\.2\.1"):
        identify(library, "1.2.0")
    with pytest.raises(LibraryError, match=r"no layout for librkllmrt.so 3\.0\.0"):
        identify(library, "3.0.0")
    with pytest.raises(LibraryError, match="by value"):
        identify(library, "1.0.1")


@pytest.mark.parametrize("version", CALLABLE)
def test_a_known_release_takes_no_other_layout(make_library: MakeLibrary, version: str) -> None:
    library = make_library([line(version)], declared(version))
    for other in CALLABLE:
        if release_named(other).layout == release_named(version).layout:
            assert identify(library, other).release == RELEASES[version]
        else:
            with pytest.raises(LibraryError, match=f"release {version}, whose layout is not that of {other}"):
                identify(library, other)


def test_contradictions(make_library: MakeLibrary) -> None:
    with pytest.raises(
        LibraryError, match=r"says 1\.2\.3, but release 1\.2\.3 has rkllm_get_kv_cache_size, which this file"
    ):
        identify(make_library([line("1.2.3")], declared("1.2.0")))
    with pytest.raises(LibraryError, match=r"several version texts: 1\.2\.3, 1\.3\.0"):
        identify(make_library([line("1.2.3"), line("1.3.0")], declared("1.2.3")))
    # The same version twice is one.
    assert identify(make_library([line("1.2.3"), "x " + line("1.2.3")], declared("1.2.3"))).version == "1.2.3"


def test_additional_functions_are_a_notice(make_library: MakeLibrary) -> None:
    """A library may export what its header declares later only."""
    odd = identify(make_library([line("1.1.4")], declared("1.2.0")))
    assert odd.release == RELEASES["1.1.4"]
    assert "exports rkllm_clear_kv_cache, which came with 1.2.0, after 1.1.4" in odd.notice
    assert identify(make_library([line("1.1.4")], [*declared("1.1.4"), "rkllm_print_timings"])).notice == ""


LOG_FORMAT = "I rkllm: rkllm-runtime version: %s, rknpu driver version: %s, platform: %s"


@pytest.mark.parametrize(
    ("texts", "symbols", "release"),
    [
        (["1.2.2", LOG_FORMAT], "1.2.2", "1.2.2"),
        ([LOG_FORMAT, "1.1.4"], "1.1.4", "1.1.4"),
        ([line("1.2.3"), "1.2.0", LOG_FORMAT], "1.2.3", "1.2.3"),
        (["1.2.2", LOG_FORMAT], "1.1.4", None),  # symbols contradict it
        (["1.2.2", "something", LOG_FORMAT, "else", "1.3.0"], "1.2.2", None),
        (["1.2.2", LOG_FORMAT, "1.3.0"], "1.2.2", None),
        ([LOG_FORMAT, "2.3.3b0"], "1.2.2", None),  # of another library
        (["1.2.2"], "1.2.2", None),
    ],
)
def test_a_version_next_to_the_logs_format(
    make_library: MakeLibrary, texts: list[str], symbols: str, release: str | None
) -> None:
    # In one array, so that the compiler keeps them next to each other.
    library = make_library(["\\000".join(["first", *texts, "last"])], declared(symbols))
    identity = inspect_library(library)
    assert identity.release == (RELEASES[release] if release else None)
    assert ("next to the format of its log" in identity.notice) == (release is not None and len(texts) == 2)


@pytest.mark.parametrize("names", [declared("1.2.3"), declared("1.3.0")])
def test_symbols_alone_do_not_decide(make_library: MakeLibrary, names: list[str]) -> None:
    with pytest.raises(LibraryError, match="no RKLLM version text"):
        identify(make_library([], names))
    with pytest.raises(LibraryError, match="version text is not readable"):
        identify(make_library(["RKLLM SDK (version: latest | target: Linux)"], names))


def test_other_files(make_library: MakeLibrary, tmp_path: Path) -> None:
    text, empty = tmp_path / "librkllmrt.so", tmp_path / "empty.so"
    text.write_text("not a library\n" * 100)
    empty.touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, match in (
        (text, "not a shared library"),
        (empty, "is empty"),
        (folder, "cannot be read"),
        (tmp_path / "none.so", "cannot be read: No such file"),
        (make_library([line("1.2.3")], ["rknn_init"]), "exports no function of rkllm.h"),
        (Path(sys.executable).resolve(), "not a shared library|exports no function"),
    ):
        with pytest.raises(LibraryError, match=match):
            identify(path)


def test_other_machines(make_library: MakeLibrary, tmp_path: Path) -> None:
    """A board's library can be looked at anywhere; loading it is another matter."""
    data = bytearray(make_library([line("1.2.3")], declared("1.2.3")).read_bytes())
    other = 62 if os.uname().machine == "aarch64" else 183
    data[18:20] = other.to_bytes(2, "little")
    path = tmp_path / "librkllmrt.so"
    path.write_bytes(data)
    identity = identify(path)
    assert identity.machine == {62: "x86_64", 183: "aarch64"}[other]
    with pytest.raises(LibraryError, match=f"is for {identity.machine}, but this machine is {os.uname().machine}"):
        check_machine(path, identity.machine)
    data[4] = 1  # 32-bit
    path.write_bytes(data)
    with pytest.raises(LibraryError, match="32-bit library"):
        identify(path)


def test_json(make_library: MakeLibrary) -> None:
    plain = inspect_library(make_library([line("1.3.1")], declared("1.3.1"))).as_dict()
    assert (plain["version"], plain["layout"], plain["layout_evidence"], plain["problem"]) == (
        "1.3.1",
        "L8",
        "computed",
        None,
    )
    assert set(LAYOUTS["L8"]) == {"1.3.1"}


# --- the ELF reader ----------------------------------------------------------------------------------------------


def exported_by_pyelftools(path: Path) -> set[str]:
    with path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".dynsym")
        return {
            symbol.name
            for symbol in table.iter_symbols()
            if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_LOCAL" and symbol.name
        }


def symbols(path: Path) -> frozenset[str]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return read_elf(path, data).symbols


def test_symbols_equal_those_of_pyelftools(make_library: MakeLibrary) -> None:
    paths = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    paths.add(make_library([], ["only"], "-Wl,--hash-style=sysv"))
    paths.add(make_library([], []))
    assert len(paths) > 5
    for path in paths:
        assert symbols(path) - {""} == exported_by_pyelftools(path), path


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_refused_or_read(make_library: MakeLibrary, tmp_path: Path, data: st.DataObject) -> None:
    """Any file ends as an identity or as a LibraryError, in no time and without touching memory it does not own."""
    global _sample
    _sample = _sample or make_library([line("1.2.3")], declared("1.2.3")).read_bytes()
    damaged = bytearray(_sample)
    # Where the reader looks: header, program headers, dynamic segment, and the tables it leads to.
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.one_of(st.integers(0, 0x400), st.integers(0, len(damaged) - 1)))
        damaged[at] = data.draw(st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    path = tmp_path / "damaged.so"
    path.write_bytes(damaged[:cut])
    try:
        inspect_library(path)
    except LibraryError as error:
        assert str(path) in error.message


_sample = b""


def test_a_32_bit_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.maxsize", (1 << 31) - 1)
    with pytest.raises(LibraryError, match="This Python is a 32-bit program"):
        check_machine(Path("librkllmrt.so"), os.uname().machine)


@pytest.mark.parametrize(("unit", "empty", "told"), [(False, True, False), (True, True, True), (True, False, False)])
def test_what_a_unit_cannot_see_is_named(
    unit: bool, empty: bool, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A desktop's terminal is a unit, too, but sees the home folders."""
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    if unit:
        monkeypatch.setenv("INVOCATION_ID", "0123")
    assert set(folders._HIDDEN) == {"/home", "/root", "/run/user"}
    hidden = tmp_path / "home"
    hidden.mkdir()
    if not empty:
        (hidden / "somebody").mkdir()
    monkeypatch.setattr(folders, "_HIDDEN", (str(hidden),))
    for use in (identify, open_bundle, check_readable):
        for path, hints in ((hidden / "someone/nowhere", told), (tmp_path / "nowhere", False)):
            with pytest.raises(RKEdgeError) as caught:
                use(path)
            assert ("ProtectHome=" in caught.value.hint) == hints
